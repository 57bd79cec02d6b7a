"""An image with its kept patches: grids of real processors, what is drawn where, and the command."""

import json

import numpy
import pytest
import torch
import transformers as hf
import vlm_models
import vlm_zoo
from PIL import Image

from thresher import cli
from thresher.errors import ArgumentError
from thresher.generation.last_call import LastCall
from thresher.tools import kept_patches


def picture(width=64, height=32):
    """No patch of it is dark."""
    noise = numpy.random.default_rng(0).integers(128, 255, (height, width, 3), dtype=numpy.uint8)
    return Image.fromarray(noise)


def prompt(count):
    ids = torch.full((1, count + 8), 7)
    ids[0, 3 : 3 + count] = vlm_models.MARK
    return ids


def test_grids_are_those_of_real_processors():
    qwen = vlm_zoo.build("Qwen2.5-VL")
    how = hf.Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=64 * 64)
    made = dict(how(images=picture(64, 32), return_tensors="pt"))
    count = int(made["image_grid_thw"].prod()) // 4
    assert kept_patches.grid_of(qwen, {"input_ids": prompt(count), **made}) == (4, 8)
    llava = vlm_zoo.build("LLaVA")
    assert kept_patches.grid_of(llava, {"input_ids": prompt(16)}) == (4, 4)
    pixtral = vlm_zoo.build("LLaVA, Pixtral's tower")
    sizes = {"input_ids": prompt(32), "image_sizes": torch.tensor([[32, 64]])}
    assert kept_patches.grid_of(pixtral, sizes) == (4, 8)
    with pytest.raises(ArgumentError, match="--grid 24x24"):
        kept_patches.grid_of(llava, {"input_ids": prompt(20)})
    with pytest.raises(ArgumentError, match="a prompt with an image"):
        kept_patches.grid_of(llava, {"input_ids": torch.ones(1, 9).long()})


def test_patches_left_out_are_dark_and_the_others_as_they_were():
    image = picture()
    first, last = torch.ones(32, dtype=torch.bool), torch.zeros(32, dtype=torch.bool)
    last[[0, 13, 31]] = True  # of 4 rows of 8
    sheet = numpy.asarray(kept_patches.draw(image, (4, 8), {"all": first, "three": last})).astype(int)
    high, wide = 32 * 7, 64 * 7  # enlarged to 224 pixels
    panels = [sheet[18:, :wide], sheet[18:, wide + 8 :]]
    assert [p.shape for p in panels] == [(high, wide, 3)] * 2
    whole = numpy.asarray(image.resize((wide, high))).astype(int)
    assert (panels[0] == whole).all()
    for place in range(32):
        y, x = divmod(place, 8)
        box = slice(y * 56, y * 56 + 56), slice(x * 56, x * 56 + 56)
        assert (panels[1][box] == whole[box]).all() if last[place] else panels[1][box].max() < 80
    with pytest.raises(ArgumentError, match="31 tokens for 'one'"):
        kept_patches.draw(image, (4, 8), {"one": last[:31]})


def test_layers_that_keep_the_same_are_one_picture():
    batch = {"input_ids": prompt(4)}
    every, some = torch.arange(12)[None], torch.tensor([[0, 1, 2, 4, 6, 7, 8, 9, 10, 11, -1, -1]])
    found = kept_patches.kept_of(vlm_zoo.build("LLaVA"), batch, LastCall([12], at=[every, every, some]))
    assert {k: v.tolist() for k, v in found.items()} == {
        "layers 1 to 2: 100% kept": [True] * 4,
        "layer 3: 50% kept": [False, True, False, True],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaVA with its processor, as save_pretrained writes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, 128))]
    words[vlm_models.MARK] = "<image>"
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=made, additional_special_tokens=["<image>"], **special
    )
    side = {"height": 32, "width": 32}
    images = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=side)
    path = tmp_path_factory.mktemp("llava")
    vlm_zoo.build("LLaVA").save_pretrained(path)
    hf.LlavaProcessor(images, tokenizer, patch_size=8, vision_feature_select_strategy="default", image_token="<image>",
                      num_additional_image_tokens=1).save_pretrained(path)  # fmt: skip
    return path


def run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["thresher", "show", *map(str, words)])
    try:
        cli.main()
    except SystemExit as stopped:
        return stopped.code or 0
    return 0


def test_the_command_draws_what_the_model_saw(folder, monkeypatch, capsys, tmp_path):
    image, recipe, out = tmp_path / "in.png", tmp_path / "half.toml", tmp_path / "kept.png"
    picture().save(image)
    recipe.write_text(
        "[transprune]\nstages = [[1, 0.5]]\nmin_image_tokens = 2\nbucket = 1\nmin_saving = 0.0\n"
    )
    given = (
        folder,
        image,
        "--question",
        "w9 w10 w11",
        "--recipe",
        recipe,
        "--tokens",
        1,
        "--out",
        out,
        "--json",
    )
    assert run(monkeypatch, *given) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["grid"] == [4, 4] and list(said["kept"].values()) == [1.0, 0.5]
    sheet = Image.open(out)
    assert sheet.size == (2 * 224 + 8, 224 + 18)  # the processor cut the sides off
    shown = numpy.asarray(sheet.crop((232, 18, 456, 242))).reshape(4, 56, 4, 56, 3)
    assert (shown.max((1, 3, 4)) > 100).sum() == 8


@pytest.mark.parametrize(
    ("words", "said"),
    [(("missing.png",), "image: got 'missing.png'"), (("in.png", "--grid", "4by4"), "--grid: got '4by4'")],
)
def test_wrong_input_names_its_fix(folder, monkeypatch, capsys, tmp_path, words, said):
    monkeypatch.chdir(tmp_path)
    picture().save("in.png")
    assert run(monkeypatch, folder, *words) == 2
    assert said in " ".join(capsys.readouterr().err.split())
