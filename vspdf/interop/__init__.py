"""Other people's formats, translated at the door: Hugging Face folders, the Cerebras stack, other trainers."""
