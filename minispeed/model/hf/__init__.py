"""Models in HuggingFace's form: GPT-2, Llama, Qwen2, Qwen3 and StableLM, from a folder into our GPT and out again.

config.py    config.json <-> GPTConfig, key by key
weights.py   which tensors of the files are which parameter of ours
read.py      a folder as a source of parameters, of which any slice is read alone
write.py     a folder that `transformers` loads
"""

from minispeed.model.hf.config import is_hf as is_hf, read_config as read_config
from minispeed.model.hf.read import HFSource as HFSource, load as load, resolve as resolve
from minispeed.model.hf.write import save as save
