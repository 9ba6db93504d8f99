"""Continue prompts with any causal language model: greedy or sampled, in batches, whole or as a stream of text."""

from pathlm.generate.batch import context_of
from pathlm.generate.decoding import generate
from pathlm.generate.prompts import read_prompts, run
from pathlm.generate.sampling import Sampling
from pathlm.generate.streaming import Detokenizer, Piece, encode_prompt, stream

__all__ = ["Detokenizer", "Piece", "Sampling", "context_of", "encode_prompt", "generate", "read_prompts", "run", "stream"]
