"""Files: adapters, statistics and checkpoints in one format."""

from .adapters import load as load
from .adapters import save as save
from .tensors import open_tensors as open_tensors
from .tensors import read_tensors as read_tensors
from .tensors import write_tensors as write_tensors
