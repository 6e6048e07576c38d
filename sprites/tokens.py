"""The tokenizer: a CLIPTokenizer whose byte-pair merges were run over the vocabulary of the captions.

Every known word is one token; any other word falls apart into letters that the text encoder never saw.
"""

from collections import Counter
from itertools import pairwise

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sprites.scenes import WORDS

MAX_LENGTH = 16
END = "</w>"  # marks a word's last symbol
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def byte_pair_merges(words):
    """Merges, in order, that make each word one symbol: the commonest pair first, ties by the alphabet."""
    symbols = [[*word[:-1], word[-1] + END] for word in words]
    merges = []
    while pairs := Counter(pair for word in symbols for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        symbols = [apply_merge(word, best) for word in symbols]
    return merges


def apply_merge(word, pair):
    merged = []
    for symbol in word:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def build_tokenizer():
    """The tokenizer, padded and truncated to MAX_LENGTH; its vocabulary ends with the two special tokens."""
    letters = sorted(bytes_to_unicode().values())
    merges = byte_pair_merges(WORDS)
    vocabulary = [
        *letters,
        *(letter + END for letter in letters),
        *("".join(pair) for pair in merges),
        *SPECIAL,
    ]
    ids = {token: i for i, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=MAX_LENGTH)


def token_ids(tokenizer, prompts):
    """Token ids of the prompts: (B, MAX_LENGTH)."""
    return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
