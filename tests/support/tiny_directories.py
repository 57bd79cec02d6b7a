"""Directories of tiny Hugging Face models with a tokenizer of words, as `save_pretrained` writes them."""

from pathlib import Path

import torch
import transformers as hf

WORDS = (
    *(
        "the",
        "a",
        "of",
        "in",
        "and",
        "to",
        "is",
        "that",
        "on",
        "for",
        "with",
        "as",
        "by",
        "it",
        "be",
        "this",
        "not",
    ),
    *("are", "or", "an", "grain", "chaff", "field", "harvest", "mill"),
)
VOCABULARY = 64
TEXTS = [
    "the grain is in the field",
    "the harvest of this field is grain and chaff",
    "it is not in the mill",
    "a mill",
    "the chaff is not the grain that the mill is for",
    "this is the harvest",
]
_SMALL = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY
)
_T5 = dict(
    vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0
)


def tokenizer(**given):
    """Words of WORDS, a pad token (0), an end token (1), a token for all other words (2)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    known = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    words = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 64, **given}
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, **words)


def llama(**given):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**_SMALL, "num_key_value_heads": 2, "pad_token_id": 0,
                                                 "eos_token_id": 1, "bos_token_id": 1, **given}))  # fmt: skip


def classifier():
    return hf.BertForSequenceClassification(hf.BertConfig(**_SMALL, num_labels=3, max_position_embeddings=24))


def roberta():
    return hf.RobertaModel(
        hf.RobertaConfig(**_SMALL, max_position_embeddings=18, pad_token_id=1, type_vocab_size=1)
    )


def t5():
    return hf.T5ForConditionalGeneration(hf.T5Config(**_T5))


def gpt2():
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=VOCABULARY, n_positions=64,
                                            bos_token_id=1, eos_token_id=1))  # fmt: skip


def save(model, path: Path, **given) -> Path:
    """The directory, with weights drawn from one seed."""
    torch.manual_seed(0)
    model.apply(model._init_weights)
    model.eval().save_pretrained(path)
    tokenizer(**given).save_pretrained(path)
    return path
