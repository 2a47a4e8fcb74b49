"The public names. Each is imported from its module when it is first asked for."

from .algebra.polynomial import PrefixError, Verdict, canonical_inner, same_inner, verify, verify_batch
from .algebra.exact_decomposition import decompose_exact
from .algebra.problems import (
    Problem, filter_by_degree, generate_multivariate, generate_on_singlets, generate_problems, mix, read_problems,
    write_problems)
from .search.allowed_sequences import AllowedSequences
from .search.constraints import Constraint
from .search.custom_generate import tree_generate
from .search.decoding import Beams
from .search.generation import beam_search, greedy, sample
from .policy.checkpoints import convert_checkpoint
from .policy.loading import load_model, save_model
from .policy.model import PRESETS, load_tokenizer
from .learn.rewards import VerifiedReward
from .learn.ranking import TargetReward
from .learn.trie import trie_logps
from .learn.trl_batching import roll_out
from .learn.config import BGRPOConfig
from .learn.trainer import BGRPOTrainer
from .solve.beam_filter import filter_by_beams, search_problems
from .solve.decomposition import Decomposition, decompose
from .solve.decomposition_reward import decomposition_reward
from .solve.evaluation import Report, compare, evaluate
from .recipes.train import TrainConfig, train_bgrpo

__all__ = [
    "AllowedSequences", "BGRPOConfig", "BGRPOTrainer", "Beams", "Constraint", "Decomposition", "PRESETS",
    "PrefixError", "Problem", "Report", "TargetReward", "TrainConfig", "Verdict", "VerifiedReward",
    "beam_search", "canonical_inner", "compare", "convert_checkpoint", "decompose", "decompose_exact",
    "decomposition_reward", "evaluate", "filter_by_beams", "filter_by_degree", "generate_multivariate",
    "generate_on_singlets", "generate_problems", "greedy", "load_model", "load_tokenizer", "mix",
    "read_problems", "roll_out", "same_inner", "sample", "save_model", "search_problems", "train_bgrpo",
    "tree_generate", "trie_logps", "verify", "verify_batch", "write_problems",
]
