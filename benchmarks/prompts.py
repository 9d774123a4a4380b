"""Harmless prompts for the benchmarks, written for this project."""

PROMPTS = [
    "Explain in three sentences why the sky looks blue during the day.",
    "Write a short letter to a friend about a walk in the mountains.",
    "List five vegetables and say one thing about how each of them grows.",
    "A train leaves at 9:15 and arrives at 11:50. How long does the journey take? Explain step by step.",
    "Write a Python function that returns the largest number in a list.",
    "What is the difference between a lake and a river?",
    "Give me a simple recipe for pancakes with a list of ingredients.",
    "Summarise in two sentences: The museum opens at ten. It shows old maps, ship models and letters of sailors. "
    "Visitors may touch the models but not the letters.",
    "Translate into French: The library is closed on Sunday.",
    "Describe the life of a honeybee from egg to worker.",
    "Who wrote Hamlet, and what is the play about?",
    "Tell a short story about a lighthouse keeper and a lost seagull.",
    "How do I keep my houseplants healthy in winter?",
    "Explain what a prime number is and give the first ten of them.",
    "Write four lines of poetry about the first snow of the year.",
    "What should I think about before I adopt a dog?",
    "Repeat the following list in alphabetical order: pear, apple, plum, cherry, fig, apricot.",
    "Explain how a bicycle stays upright while it moves.",
    "I have 24 apples and give a third of them away, then half of the rest. How many are left?",
    "Write a polite e-mail that asks a colleague to move a meeting from Monday to Tuesday.",
    "What causes the tides, and why are there two of them a day?",
    "Name three ways to save water at home and explain each in one sentence.",
    "Act as a tour guide and describe a small harbour town in the evening.",
    "Rewrite this sentence in the passive voice: The gardener planted the tulips in autumn.",
]
