"""What chat templates write around a user's words, found by rendering them."""

import pytest
import tiny_directories
import torch

from thresher import prompt_tokens
from thresher.errors import ArgumentError
from thresher.tools.chat import user_turn

CHATML = (
    "{% for m in messages %}a {{ m['role'] }} is {{ m['content'] }} . {% endfor %}"
    "{% if add_generation_prompt %}a assistant is {% endif %}"
)
PLAIN = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
PARTS = (
    "{% for m in messages %}the {% if m['role'] == 'user' %}field{% else %}mill{% endif %} on "
    "{% for c in m['content'] %}{{ c['text'] }}{% endfor %} in {% endfor %}"
    "{% if add_generation_prompt %}the mill on{% endif %}"
)


def tokenizer(template):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*tiny_directories.WORDS, "user", "assistant", ".", "Xylophone", "Yesterday", "Zeppelin"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    import transformers

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", chat_template=template
    )


@pytest.mark.parametrize(
    ("template", "begin", "end"),
    [(CHATML, "a user is", ". a assistant is"), (PARTS, "the field on", "in the mill on")],
)
def test_marks_are_what_turns_have_in_common(template, begin, end):
    made = tokenizer(template)
    assert user_turn(made) == tuple(tuple(made(text)["input_ids"]) for text in (begin, end))
    words = "the grain is in the field"
    content = words if template is CHATML else [{"type": "text", "text": words}]
    turns = [dict(role="user", content=content)]
    ids = made(made.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))["input_ids"]
    found = prompt_tokens.last_turn(torch.tensor([ids]), *user_turn(made))[0]
    assert made.decode(torch.tensor(ids)[found]) == words


def test_templates_without_marks_are_refused():
    for template in (None, PLAIN, "{{ 'the' }}"):
        with pytest.raises(ArgumentError, match="Give the ids themselves"):
            user_turn(tokenizer(template))
