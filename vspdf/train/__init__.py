"""Takes a model through its phases and writes down what was done."""

from vspdf.train.trainer import train as train
