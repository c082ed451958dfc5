"""Ordinary questions, whose answers repeat themselves less than those to random words."""

_ASKED = (
    "Write a short story about a lighthouse keeper.",
    "Explain how photosynthesis works.",
    "What were the main causes of the French Revolution?",
    "Write a Python function that reverses a linked list, with comments.",
    "Give me five tips for better sleep.",
    "Summarise the plot of Romeo and Juliet.",
    "What is the difference between TCP and UDP?",
    "Write an email to my landlord about a broken heater.",
    "List the planets with one fact about each.",
    "How do I make pancakes?",
    "Explain recursion to a child.",
    "Write a poem about autumn.",
    "What is machine learning?",
    "Compare cats and dogs as pets.",
    "Describe the water cycle.",
    "How does a car engine work?",
)

# SmolLM2's chat template, written out: not every server is asked by its route for chats.
QUESTIONS = tuple(
    f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n" for asked in _ASKED
)
