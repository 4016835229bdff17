"""Chapter 00, exercise: predict the bytes of a training step from the model's configuration alone.

Everything is in fp32, 4 bytes a number. The models are those of the chapter: a GPT whose head is the embedding, without
biases, with LayerNorm (weight and bias), SwiGLU, rotary positions and fused attention. A configuration gives you

    config.vocab_size    V    tokens that there are
    config.num_layers    L    blocks
    config.model_dim     D    numbers of the stream for each token
    config.num_heads     H    query heads         config.num_kv_heads  G    key heads, and as many value heads
    config.head_dim      K    numbers of a head   config.hidden_dim    F    numbers inside the MLP

The lesson's two tables say all that you need. Try your copy with

    python tutorials/learn.py 00
"""

from minispeed.model.config import GPTConfig

FP32, INT64, BOOL = 4, 8, 1  # bytes of an element


def count_parameters(config: GPTConfig) -> int:
    """Return P, how many numbers the model learns.

    The embedding, (V, D), which is the head, too. In every block: a norm before attention and one before the MLP, each
    with a weight and a bias of D; qkv, from D to (H + 2 G) K; out, from H K to D; and the MLP's three matrices between
    D and F. After the last block one more norm.

    Example  V 512, L 4, D 128, H = G = 4, K 32, F 384: 919,808
    """
    raise NotImplementedError


def bytes_of_states(config: GPTConfig) -> dict[str, int]:
    """Return what is held from step to step, in bytes: {"parameters": ..., "gradients": ..., "optimizer": ...}.

    Gradients are there from the backward to the update. Adam remembers two numbers of each parameter.
    """
    raise NotImplementedError


def bytes_kept_by_block(config: GPTConfig, tokens: int) -> int:
    """Return the bytes that autograd keeps of one block's forward, of so many tokens in all.

    There are two heads and two tokens or more: where there is one, torch need not copy what it transposes.

    Example  the model above, 1 token: 11,808
    """
    raise NotImplementedError


def bytes_kept_beside(config: GPTConfig, tokens: int) -> dict[str, int]:
    """Return what is kept outside the blocks. This one is given: nothing is to be done here.

    tokens         the embedding's backward needs to know which rows were looked up
    rotary         cosine and sine of every position's angles, shared by all blocks
    norm and loss  the last norm's input, mean and deviation; the head's input, the labels, which tokens have one, and
                   the logarithm of each softmax's sum
    """
    D, K = config.model_dim, config.head_dim
    return {
        "tokens": INT64 * tokens,
        "rotary": FP32 * K * tokens,
        "norm and loss": (FP32 * (2 * D + 3) + INT64 + BOOL) * tokens,
    }


def rows_that_fit(config: GPTConfig, tokens: int, budget: int) -> int:
    """Return how many rows of so many tokens a step may have, for `budget` bytes to hold the end of its forward.

    Then parameters, the optimizer's states and everything that is kept are alive, and no gradient is. Not even one row
    may fit: that is 0.
    """
    raise NotImplementedError
