"""Text into batches: mixtures, cleaning, token shards and the stateless loader.

Read in this order: `mixture` (what is to be built), `installed` and `sources` (where text comes from), `cleaning`
(duplicates, evaluation text), `build` (the stages, which `workers` share), `tokenise` (one part into shards), `shards`
(files and the manifest), `loader` (batches).
"""

from fp8lab.data.build import build, train_tokenizer
from fp8lab.data.loader import Loader, TokenDataset
from fp8lab.data.mixture import MixtureConfig, load_mixture

__all__ = ["Loader", "MixtureConfig", "TokenDataset", "build", "load_mixture", "train_tokenizer"]
