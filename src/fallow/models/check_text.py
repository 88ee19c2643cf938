"""The text that `model check` measures with: questions, and how the default model answers them in float32, greedily.

Where a model answers it is mostly sure of itself, so that a token which flips here is one that an answer would show. On
free prose, where it is not, an 8-bit import of the default model agrees with float32 at 97.1 % of positions (99.2 % with
float32 activations: the kernels' 8-bit activations cost more than the weights do).
"""

TEXT = """\
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
