"""The texts that `model check` measures with; a model is judged by the first.

`PROSE` was written for this, and no model has seen it: the stricter measure, since on free prose a model is unsure, and
small differences change its first choice. `ANSWERS` are questions and how the default model itself answers them,
greedily, in float32: there it is mostly sure, so that a choice which flips is one that an answer would show.
"""

PROSE = """\
A field lies fallow when a farmer ploughs it and then leaves it unsown for a season. The soil rests, water \
soaks in, and the plants that grow by themselves are turned under before they set seed. In the Middle Ages \
most villages in northern Europe divided their land into three great fields. One was sown in autumn with wheat \
or rye, one in spring with oats, barley or peas, and the third was left alone, so that every year a third of \
the land gave nothing at all.

Was that a waste? People argued about it for centuries. "Land that sleeps does not pay," said the landlords; \
"land that never sleeps soon dies," said the peasants. In the end both were partly right. When farmers learned \
to grow clover and turnips in the resting field, the clover fed the soil with nitrogen and the turnips fed the \
cattle through the winter. Between 1750 and 1850 the yield of wheat in England rose from about 18 to 28 \
bushels an acre.

Computers rest far more than fields do. A laptop that is used for six hours a day is idle for the other \
eighteen, and even while somebody types, the processor waits for most of the time. If n machines are each free \
with probability p, then on average n * p of them can work, but the number changes from hour to hour. The \
chance that none of three machines is free is (1 - p) ** 3; with p = 0.6 that is 0.4 * 0.4 * 0.4 = 0.064.

def available(machines, hour):
    # Machines whose owners are away at this hour.
    free = []
    for machine in machines:
        if not machine.busy(hour) and machine.plugged_in:
            free.append(machine)
    return free

The doctor closed the door quietly and sat down by the window. It had rained all morning, and the road to the \
harbour was empty except for a boy with a red umbrella. She took the letter from her pocket, read it once more \
from beginning to end, and put it away again. There was still time to answer, she thought, but not much.
"""

ANSWERS = """\
Question: How does a heat pump work?
Answer: A heat pump is a device that uses heat to cool or warm a building. It's a type of HVAC system that uses \
a refrigerant to transfer heat from the outside environment to the inside environment. The process involves a \
heat exchanger that absorbs heat from the building's exterior and transfers it to the indoor air through a \
process called heat transfer.

The heat pump works by using a refrigerant to cool a heat exchanger, which is typically a heat exchanger with a \
heat transfer surface. The heat transfer surface is designed to absorb heat from the refrigerant, which is then \
used to cool the building's exterior. The heat transfer process is controlled by a thermostat, which regulates \
the temperature of the heat exchanger to maintain a comfortable indoor temperature.

The heat pump uses a refrigerant to cool the heat exchanger, which is a critical component of the heat pump's \
operation.

Question: Write a short story about a miller who lives by a river.
Answer: In the sleepy town of Ravensburg, nestled between the rolling hills of the countryside and the sparkling\
 blue waters of the Baltic Sea, the town of Ravensburg was born. The miller, a kind-hearted and hardworking man \
named Hans, had always dreamed of building a life beyond his humble mill. He was a skilled craftsman, with a \
passion for craftsmanship and a love for the natural world.

One day, a young and ambitious miller named Elfrida stumbled upon a hidden glen of gold. She had heard rumors of\
 a legendary mill that could be built on the edge of the town, but she had never heard of it. Elfrida was \
determined to find it. She spent years searching for the legendary mill, but she never found it.

As she was walking home from the market,

Question: How do I bake a simple bread?
Answer: To bake a simple bread, you'll need a few ingredients and a few steps. First, you'll need flour, water, \
yeast, and a few types of bread. You'll also need a dough, which can be made from flour, water, yeast, and a \
pinch of salt.

The first step is to prepare the dough. You'll need to knead the dough until it becomes smooth and elastic. This\
 is where you get to experiment with different types of dough and see what works best for your recipe.

Once the dough is ready, you'll need to add the yeast to the mixture. The yeast is a type of fungus that's used \
to make bread. You'll need to add a pinch of salt to the yeast, which is a type of fungus that's used to make \
bread.

The next step

Question: Why is the sky blue?
Answer: The sky blue is a result of the Earth's atmosphere scattering sunlight in a specific wavelength range, \
specifically blue. This phenomenon occurs because of the way our eyes perceive light. When sunlight enters the \
Earth's atmosphere, it encounters tiny molecules of gases, including nitrogen and oxygen, which absorb certain \
wavelengths of light. These molecules scatter the light in all directions, but some of them, particularly the \
blue end of the spectrum, are more easily scattered by particles than others. This is known as Rayleigh \
scattering, which is a natural phenomenon that occurs when light encounters molecules of gases.

The blue light is scattered in all directions, but the blue light is more efficiently scattered by the molecules\
 of gases, resulting in the blue color of the sky.
"""
