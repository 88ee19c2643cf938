"""The text that `model check` measures with: written for it, in several registers, about 900 tokens. Never change it
without measuring the bounds in `check.py` again."""

TEXT = """\
The mill had stood at the bend of the river for longer than anyone could remember. Its wheel turned slowly in the dry
months and fast in spring, when the snow came down from the hills, and the miller used to say that he could tell the
date by the sound of it. When the new road was built, most of the farmers took their grain to the town, where the
machines were quicker and the price was a little better. The miller did not complain. He mended nets, kept bees, and
ground flour for the few who still came, and on warm evenings the children of the village swam in the pond behind the
weir while he sat on the wall and told them stories about the flood.

"Did the water really reach the roof?" asked the youngest of them.
"It reached the weathercock," said the miller, "and the cock learned to swim."
"That is not true!"
"No," he said. "But the part about the roof is."

A heat pump moves heat from a cold place to a warm one. It does so with a fluid that boils at a low temperature: the
fluid evaporates outside, where it takes up heat from the air, is compressed, which makes it hotter, and condenses
inside, where it gives that heat to the house. Because the heat is moved and not made, a good heat pump delivers three
or four times as much energy as it uses. The colder it is outside, the smaller this factor becomes. For this reason the
size of the radiators, the insulation of the walls and the temperature of the water all matter more than the machine.

To make a simple bread, mix 500 grams of flour with 10 grams of salt, 5 grams of dry yeast and 350 millilitres of warm
water. Knead the dough for ten minutes, until it is smooth and springs back when you press it. Cover it and let it rest
for one hour in a warm place. Shape it into a loaf, let it rest for another thirty minutes, and bake it for about forty
minutes at 220 degrees. The bread is done when it sounds hollow if you knock on the bottom.

Question: A train leaves the station at 9:15 and travels at 80 kilometres per hour. How far has it gone at 11:45?
Answer: From 9:15 to 11:45 it is two and a half hours. In two and a half hours at 80 kilometres per hour the train goes
2.5 times 80, which is 200 kilometres.

def count_words(text):
    \"\"\"Return a dictionary with the number of times that each word occurs.\"\"\"
    counts = {}
    for word in text.lower().split():
        counts[word] = counts.get(word, 0) + 1
    return counts


def most_common(text, n=3):
    counts = count_words(text)
    return sorted(counts, key=counts.get, reverse=True)[:n]

Dear Anna,
Thank you for your letter of 4 March. I am glad to hear that the move went well and that the children like their new
school. We have had rain for two weeks, and the garden is full of snails; your father counts them every morning and
reports the number at breakfast. Yesterday it was sixty-one. Please tell us when you will visit, so that we can get the
small room ready. There is a train at ten past eight that arrives here before noon, and I will meet you at the station.
With love from all of us,
Mother
"""
