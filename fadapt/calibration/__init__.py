"""Calibration: statistics of the frozen model's activations, as reductions that combine."""

from .compact import PairedSums as PairedSums
from .compact import Pairs as Pairs
from .compact import Sketch as Sketch
from .distributed import all_reduce as all_reduce
from .moments import PCA as PCA
from .moments import CentredGram as CentredGram
from .moments import Gram as Gram
from .observe import observe as observe
from .prepare import as_stats as as_stats
from .prepare import prepare as prepare
from .reductions import MaxAbs as MaxAbs
from .reductions import Reduction as Reduction
from .reductions import Statistic as Statistic
from .reductions import Sum as Sum
from .reductions import SumAbs as SumAbs
from .reductions import SumSq as SumSq
from .spectrum import Spectrum as Spectrum
from .stats import Stats as Stats
from .stats import combine_all as combine_all
from .texts import text_batches as text_batches
from .wanda import wanda_scores as wanda_scores
