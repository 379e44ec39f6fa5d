"""What `ALaST.show` shows, of whatever it is given, and that training does not notice."""

import base64
import io
import re

import pytest
import torch
from conftest import tiny_deit, tiny_vit
from helpers.budgets import dropping
from PIL import Image
from torch.nn.functional import cross_entropy

from snello import ALaST
from snello.errors import ConfigError
from snello.vit import ViT


def photo(size=(24, 16)):
    """A picture that is red on the left and blue on the right."""
    image = Image.new("RGB", size, (230, 20, 20))
    image.paste((20, 20, 230), (size[0] // 2, 0, size[0], size[1]))
    return image


def merging(model, **options):
    return ALaST(model, **{"rule": "merge-even", "merge_blocks": (0, 2), "start_budget": 0.5, **options})


def shown_picture(html):
    data = re.search(r'data:image/jpeg;base64,([^"]+)"', html)
    return Image.open(io.BytesIO(base64.b64decode(data[1])))


def test_a_frame_for_the_picture_and_for_each_block_that_changes_something(tmp_path):
    shown = merging(tiny_vit(), token_multiple=1).show(photo())
    captions = ["the picture: 16 tokens", "after block 0: 8 of 16 tokens", "after block 2: 4 of 16 tokens"]
    assert [caption for caption, _ in shown.frames] == captions and all(caption in repr(shown) for caption in captions)
    assert [len(set(groups)) for _, groups in shown.frames] == [16, 8, 4] and shown.grid == (4, 4)
    html = shown._repr_html_()
    assert html.count("<svg") == 3 and all(f"<figcaption>{caption}<" in html for caption in captions)
    shown.save(str(tmp_path / "tokens.html"))
    page = (tmp_path / "tokens.html").read_text()
    assert html in page and page.startswith("<!doctype html>") and not re.search(r'(href|src)="(?!data:)', page)


def test_pictures_pixels_and_tensors_of_the_model_show_the_same_picture():
    alast = merging(tiny_vit(), token_multiple=1)
    pixels = torch.tensor([230, 20, 20], dtype=torch.uint8)[:, None, None].expand(3, 16, 16).clone()
    pixels[:, :, 8:] = torch.tensor([20, 20, 230], dtype=torch.uint8)[:, None, None]
    normalized = (pixels.float() / 255 - 0.5) / 0.5  # as a model is given them that does not say how
    found = [alast.show(image) for image in (photo(), pixels, normalized, normalized[None])]
    assert all(shown.frames[1:] == found[1].frames[1:] for shown in found[2:])
    for shown in found:
        left, right = (shown_picture(shown._repr_html_()).getpixel((x, 8)) for x in (2, 13))
        assert left[0] > 180 > 80 > left[2] and right[2] > 180 > 80 > right[0]


def test_dropped_patches_and_a_distillation_token():
    alast = dropping(tiny_deit(), start_budget=0.75)
    _, *changes = alast.show(photo()).frames
    assert [caption for caption, _ in changes] == [
        f"after block {b}: {k} of 16 tokens" for b, k in enumerate((12, 9, 6, 4))
    ]
    assert [sum(group < 0 for group in groups) for _, groups in changes] == [4, 7, 10, 12]


@pytest.mark.parametrize("target", [None, 0.7])
def test_training_does_not_notice(target):
    def train(looks):
        model = tiny_vit(dynamic_img_size=True)
        alast = ALaST(model, seed=3, flops=target, alpha=0.3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(0)
        for step in range(4):
            alast.step()
            x, labels = torch.randn(4, 3, 16, 16), torch.randint(5, (4,))
            loss = cross_entropy(model(x), labels)
            if looks:
                alast.show(photo())
                alast.show(torch.randn(3, 32, 16, generator=torch.Generator().manual_seed(step)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return alast.state_dict(), [p.detach() for p in model.parameters()], torch.get_rng_state()

    (state, weights, noise), (other_state, other_weights, other_noise) = train(False), train(True)
    assert state == other_state and torch.equal(noise, other_noise)
    assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))


def test_nothing_to_show_is_said():
    alast = merging(tiny_vit(), full_tail=0.5)
    alast.step(progress=0.8)
    assert [caption for caption, _ in alast.show(photo()).frames] == [
        "the picture: 16 tokens; the last steps pass on all now"
    ]
    alast.detach()
    frames = merging(alast.vit, start_budget=1.0).show(photo()).frames
    assert [caption for caption, _ in frames] == ["the picture: 16 tokens; no block passes on fewer now"]


def test_other_shapes_and_types_of_weights():
    alast = merging(tiny_vit(dynamic_img_size=True).bfloat16(), token_multiple=1)
    shown = alast.show(torch.randn(3, 8, 24))
    assert shown.grid == (2, 6) and shown.frames[-1][0] == "after block 2: 3 of 12 tokens"
    assert 'width="224" height="75"' in shown._repr_html_()


def test_a_model_of_transformers_shows_pictures_too():
    transformers = pytest.importorskip("transformers")
    shape = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**shape))
    assert merging(model, token_multiple=1).show(photo()).frames[-1][0] == "after block 2: 4 of 16 tokens"


@pytest.mark.parametrize(
    ("image", "got"),
    [
        ("cat.jpg", "str"),
        (torch.zeros(1, 16, 16), r"\(1, 16, 16\)"),
        (torch.zeros(2, 3, 16, 16), r"\(2, 3, 16, 16\)"),
        (torch.zeros(3, 16, 16, dtype=torch.int64), "torch.int64"),
    ],
)
def test_what_is_no_picture_is_refused(image, got):
    with pytest.raises(ConfigError, match=rf"^image must be a PIL picture, or a tensor \(3, H, W\) .*, got {got}$"):
        merging(tiny_vit()).show(image)


def test_models_that_see_no_square_pictures_say_what_they_need():
    _, upper = ViT(tiny_vit()).cut(2)
    with pytest.raises(ConfigError, match=r"show\(\) must be on a model that sees pictures, got the upper part"):
        merging(upper, merge_blocks=(0,)).show(photo())
    with pytest.raises(ConfigError, match="image must be a float tensor"):
        merging(tiny_vit(img_size=(16, 8))).show(photo())
