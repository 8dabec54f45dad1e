"""Other people's formats, translated at the door: Hugging Face folders, the Cerebras stack, other trainers."""

from vspdf.interop.configuration import load_config as load_config
