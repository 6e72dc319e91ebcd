"""Training over several processes: what a training loop of one's own needs."""

from .gradients import all_reduce_gradients as all_reduce_gradients
