"""`python tools predict`: what it says of images beside main.py's evaluation and timm, and maps of attention beside the formula."""
import csv
import json
import os
import sys

import pytest
import timm
import torch
from conftest import ROOT, run
from PIL import Image
from timm.data import ImageNetInfo

import datasets
import gvt
from tools import predict

WORDS = ["--device=cpu", "--input-size=32", "--batch-size=8", "--num_workers=0"]


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory, run_main):
    """A run of alt_gvt_small on three classes, and its file of --predictions."""
    folder = tmp_path_factory.mktemp("predict") / "run"
    done = run_main(*WORDS, "--data-path", tiny_folder, "--epochs=1", "--warmup-epochs=0", "--output_dir", folder,
                    "--predictions", folder.parent / "said.csv")
    assert done.returncode == 0, done.stderr
    return folder / "checkpoint_best.pth"


def tool(*words, cwd=None):
    return run([sys.executable, ROOT / "tools", "predict", *words], cwd, None, 300)


def test_it_says_what_an_evaluation_says(trained, tiny_folder, tmp_path):
    done = tool(trained, tiny_folder / "val", "--device=cpu", "--csv", tmp_path / "a.csv", "--json", tmp_path / "a.json", "--grid",
                tmp_path / "grid.png", "--attention", tmp_path / "maps.png", "--batch-size=5")
    assert done.returncode == 0, done.stderr
    with open(trained.parents[1] / "said.csv", newline="") as file:
        wanted = {row["path"]: row for row in csv.DictReader(file)}
    with open(tmp_path / "a.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == len(wanted) == 11
    for row in found:
        same = wanted[os.path.relpath(row["path"], tiny_folder)]
        assert [row[f"top{i}"] for i in (1, 2, 3)] == [same[f"top{i}"] for i in (1, 2, 3)]
        for i in (1, 2, 3):
            assert float(row[f"probability{i}"]) == pytest.approx(float(same[f"probability{i}"]), abs=1e-5)
    told = json.loads((tmp_path / "a.json").read_text())
    assert [[row["path"], row["top"][0]["class"]] for row in told] == [[row["path"], row["top1"]] for row in found]
    first = found[0]
    assert done.stdout.splitlines()[0].startswith(f"{first['path']}: {first['top1']} {100 * float(first['probability1']):.1f} %, ")
    for name in ("grid.png", "maps.png"):
        with Image.open(tmp_path / name) as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 100


def test_files_that_do_not_say_it_and_images_of_every_kind(trained, tiny_folder, tmp_path):
    """Official weights have neither the model nor names; 1000 outputs are ImageNet's."""
    torch.manual_seed(0)
    net = timm.create_model("alt_gvt_small", num_classes=1000).eval()
    torch.save(net.state_dict(), tmp_path / "official.pth")
    source = Image.open(next((tiny_folder / "val" / "flower").iterdir())).convert("RGB")
    folder = tmp_path / "im ages" / "below"
    folder.mkdir(parents=True)
    source.save(folder / "a.WEBP")
    source.convert("P").save(folder / "b.gif")
    source.convert("L").save(folder / "\N{SNOWMAN}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("none")
    words = [tmp_path / "official.pth", "im ages", "im ages/*/a.*", "--device=cpu"]
    done = tool(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path}/official.pth does not say which model it is of: --model alt_gvt_small, or another\n"

    done = tool(*words, "--model=alt_gvt_small", "--input-size=64", "--top=2", "--json=said.json", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"note: {tmp_path}/official.pth names no classes: its 1000 are taken for ImageNet's",
        "warning: cannot read the image im ages/below/broken.jpg (no image of a known format): replace it or remove it"]
    rows = json.loads((tmp_path / "said.json").read_text())
    assert [os.path.basename(row["path"]) for row in rows] == ["a.WEBP", "b.gif", "\N{SNOWMAN}.png"]
    with torch.no_grad():
        image = datasets.build_transform(False, input_size=64)(source.convert("L").convert("RGB"))
        wanted = net(image[None]).softmax(1)[0]
    assert rows[2]["top"][0]["output"] == wanted.argmax().item()
    assert rows[2]["top"][0]["probability"] == pytest.approx(wanted.max().item(), abs=1e-6)
    assert rows[2]["top"][0]["class"] == ImageNetInfo("imagenet-1k").index_to_description(wanted.argmax().item())


@pytest.mark.parametrize("words, said", [
    (["no.pth", "IMAGE"], "no.pth is no file: give a checkpoint, or the name of a model that timm has published"),
    (["CHECKPOINT", "nowhere"], "there is no nowhere"), (["CHECKPOINT", "*.none"], "there is no *.none"),
    (["CHECKPOINT", "empty"], "empty has no images: their names end with one of "),
    (["CHECKPOINT", "IMAGE", "--top=0"], "--top and --batch-size must be at least 1"),
    (["CHECKPOINT", "IMAGE", "--csv=empty"], "--csv empty cannot be written (Is a directory): choose another file"),
    (["CHECKPOINT", "IMAGE", "--class-map=two.txt"], "--class-map two.txt does not name each of the 3 outputs of "),
    (["resnet18", "IMAGE", "--model=resnet18"], "--model resnet18 belongs to a file, and resnet18 is none"),
])
def test_one_line_for_each_mistake(trained, tiny_folder, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "two.txt").write_text("a\nb\n")
    image = next((tiny_folder / "val" / "flower").iterdir())
    with pytest.raises(ValueError) as error:
        predict.main([*({"CHECKPOINT": str(trained), "IMAGE": str(image)}.get(word, word) for word in words), "--device=cpu"])
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


@pytest.mark.parametrize("model, size", [("alt_gvt_small", 64), ("alt_gvt_small", 224), ("pcpvt_small_v0", 64)])
def test_maps_are_the_mean_attention(model, size):
    """Of the fused kernel nothing can be read: the formula on the layer's own inputs, window by window."""
    torch.manual_seed(0)
    net = timm.create_model(model, num_classes=3).eval()
    images, inputs = torch.randn(2, 3, size, size), {}
    for name, layer in net.named_modules():
        if name.endswith(".attn"):
            layer.register_forward_hook(lambda _, args, __, name=name: inputs.update({name: args[0]}))
    maps = dict(predict.attention_maps(net, images))
    assert list(maps) == ([f"stage {i}, {kind}" for i in (1, 2, 3, 4) for kind in ("LSA", "GSA")] if model.startswith("alt") else
                          [f"stage {i}, GSA" for i in (1, 2, 3, 4)])
    for title, found in maps.items():
        stage = int(title[6]) - 1
        kind = gvt.LocallyGroupedAttention if "LSA" in title else gvt.GlobalSubsampledAttention
        name = [name for name, layer in net.named_modules() if isinstance(layer, kind) and name.startswith(f"blocks.{stage}.")][-1]
        layer, x = net.get_submodule(name), inputs[name]
        with torch.no_grad():
            wanted = received(layer, x)
        assert torch.allclose(found, wanted, atol=1e-6), title
        if "GSA" in title:
            assert torch.allclose(found.sum((1, 2)), torch.ones(2))


def received(layer, x):
    """Mean over heads and queries of softmax(q k' / sqrt(d)), in loops."""
    B, H, W, C = x.shape
    heads = layer.num_heads
    if isinstance(layer, gvt.GlobalSubsampledAttention):
        q = layer.q(x).view(B, H * W, heads, -1)
        y = x
        if layer.sr_ratio > 1:
            y = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), layer.sr.weight, layer.sr.bias, stride=layer.sr_ratio)
            y = layer.norm(y.permute(0, 2, 3, 1))
        k = layer.kv(y).view(B, -1, 2, heads, C // heads)[:, :, 0]
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k) * (C // heads) ** -0.5
        return weights.softmax(-1).mean((1, 2)).view(B, y.shape[1], y.shape[2])
    size, out = layer.window_size, torch.zeros(B, H, W)
    padded = torch.nn.functional.pad(x, (0, 0, 0, -W % size, 0, -H % size))
    for top in range(0, H, size):
        for left in range(0, W, size):
            q, k, _ = layer.qkv(padded[:, top:top + size, left:left + size]).reshape(B, size * size, 3, heads, C // heads).unbind(2)
            weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * (C // heads) ** -0.5).softmax(-1).mean((1, 2)).view(B, size, size)
            height, width = min(size, H - top), min(size, W - left)
            out[:, top:top + height, left:left + width] = weights[:, :height, :width]
    return out


def test_attention_of_what_has_none_is_refused(tmp_path, tiny_folder):
    net = timm.create_model("test_convnext", num_classes=3)
    torch.save(net.state_dict(), tmp_path / "other.pth")
    done = tool(tmp_path / "other.pth", tiny_folder / "val", "--model=test_convnext", "--attention=a.png", "--device=cpu", cwd=tmp_path)
    assert done.returncode == 2 and "error: --attention shows LSA and GSA, which test_convnext does not have\n" in done.stderr
