"""Calibration: statistics of the frozen model's activations, as reductions that combine."""

from ..statistics.moments import PCA as PCA
from ..statistics.moments import CenteredGram as CenteredGram
from ..statistics.moments import Gram as Gram
from ..statistics.pairs import PairedSums as PairedSums
from ..statistics.pairs import Pairs as Pairs
from ..statistics.reduction import Reduction as Reduction
from ..statistics.reduction import Statistic as Statistic
from ..statistics.sketch import Sketch as Sketch
from ..statistics.spectrum import Spectrum as Spectrum
from ..statistics.sums import MaxAbs as MaxAbs
from ..statistics.sums import Sum as Sum
from ..statistics.sums import SumAbs as SumAbs
from ..statistics.sums import SumSq as SumSq
from .distributed import all_reduce as all_reduce
from .observe import observe as observe
from .stats import Stats as Stats
from .stats import combine_all as combine_all
from .texts import text_batches as text_batches
from .wanda import wanda_scores as wanda_scores
