import argparse
import bz2
import gzip
import json
import lzma
import re
import tarfile
import zipfile

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from peers.recorded import recorded
from vitrail.checkpoints.reading import Origin, origin_of
from vitrail.errors import ConfigError
from vitrail.models import create_model, load_checkpoint


@pytest.fixture
def model():
    return create_model("vit_nano", num_classes=4, img_size=16)


def state(value):
    return {key: torch.full_like(tensor, value) for key, tensor in create_model("vit_nano", 4, 16).state_dict().items()}


def first(model):
    return model.head.bias[0].item()


@pytest.mark.parametrize(
    ("content", "ema", "expected"),
    [
        (lambda: state(1), None, 1),
        (lambda: {"model": state(1)}, None, 1),
        (lambda: {"state_dict": state(1), "state_dict_ema": state(2)}, None, 2),
        (lambda: {"state_dict": state(1), "state_dict_ema": state(2)}, False, 1),
        (lambda: {"state_dict": {f"module.{key}": value for key, value in state(3).items()}}, None, 3),
        (lambda: {"model": state(1), "model_ema": state(2)}, True, 2),
    ],
)
def test_load__formats_of_other_frameworks(content, ema, expected, model, tmp_path):
    torch.save(content(), tmp_path / "x.pth")
    load_checkpoint(model, tmp_path / "x.pth", ema=ema)
    assert first(model) == expected


@pytest.mark.parametrize(("ema", "expected"), [(None, 2), (True, 2), (False, 1)])
def test_load__lightning_with_ema(ema, expected, model, tmp_path):
    with_prefix = lambda value: {f"model.{key}": tensor for key, tensor in state(value).items()}  # noqa: E731
    content = {"pytorch-lightning_version": "2", "state_dict": with_prefix(2), "current_model_state": with_prefix(1)}
    torch.save(content, tmp_path / "x.ckpt")
    load_checkpoint(model, tmp_path / "x.ckpt", ema=ema)
    assert first(model) == expected


def test_load__error_lists_the_keys(model, tmp_path):
    weights = state(1)
    weights["cls_token"] = weights.pop("norm.weight", weights.pop("fc_norm.weight", torch.zeros(1)))
    weights["blocks.0.attn.qkv.bias"] = torch.zeros(9)
    torch.save(weights, tmp_path / "x.pth")
    before = first(model)
    with pytest.raises(
        ConfigError, match=r"1 missing keys .*1 unexpected keys \(cls_token\), 1 tensors of another shape"
    ):
        load_checkpoint(model, tmp_path / "x.pth")
    assert first(model) == before


def test_load__no_ema_weights(model, tmp_path):
    torch.save(state(1), tmp_path / "x.pth")
    with pytest.raises(ConfigError, match="contains no EMA weights"):
        load_checkpoint(model, tmp_path / "x.pth", ema=True)


def test_load__code_is_not_executed(model, tmp_path):
    class ExecutesCode:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"model": ExecutesCode()}, tmp_path / "x.pth")
    with pytest.raises(ConfigError, match=r"can be loaded safely"):
        load_checkpoint(model, tmp_path / "x.pth")
    assert not (tmp_path / "executed").exists()


def test_load__resizes_positions_like_the_official_scripts(tmp_path):
    """Compare with values recorded from the official scripts."""
    for case in recorded("backbone_parts.json")["pos_embed_resize_bicubic"]:
        side = case["new_grid"]
        sizes = {"embed_dim": 8, "depth": 1, "num_heads": 1, "patch_size": 2}
        model = timm.create_model("deit_nano", img_size=2 * side, num_classes=4, **sizes)
        weights = model.state_dict()
        table = np.random.RandomState(case["seed"]).standard_normal((1, case["old_grid"] ** 2 + 1, 8))
        weights["pos_embed"] = torch.from_numpy(table.astype(np.float32))
        torch.save(weights, tmp_path / "x.pth")
        notes = load_checkpoint(model, tmp_path / "x.pth")
        old = case["old_grid"]
        assert notes == [
            f"position embeddings resized from {old}x{old} (assumed: the file records no image size) to {side}x{side}"
            " (bicubic, not antialiased)."
        ]
        values = model.pos_embed.detach()
        middle = 1 + side**2 // 2 + side // 3
        for row, name in ((1, "token1"), (middle, "token_mid"), (-1, "token_last")):
            torch.testing.assert_close(values[0, row], torch.tensor(case[name]), rtol=1e-4, atol=1e-5)
        assert values.double().norm().item() == pytest.approx(case["l2"], rel=1e-5)


@pytest.mark.parametrize("name", ["t2t_vit_7", "lvvit_t", "deit_nano_distilled"])
def test_load__other_resolution_and_classes(name, tmp_path, caplog):
    sizes = {"depth": 1}
    source = create_model(name, 7, img_size=32, **sizes)
    torch.save({"state_dict_ema": source.state_dict()}, tmp_path / "x.pth.tar")
    model = create_model(name, 4, img_size=(32, 64), **sizes)
    heads = {key: value.clone() for key, value in model.state_dict().items() if "head" in key}
    with caplog.at_level("INFO", logger="vitrail"):
        notes = load_checkpoint(model, tmp_path / "x.pth.tar")
    assert len(notes) == 2
    assert notes[1].startswith("7 classes in the checkpoint, 4 in the model: ")
    assert all(note in caplog.text for note in notes)
    state = model.state_dict()
    for key, value in heads.items():
        torch.testing.assert_close(state[key], value)
        assert key.partition(".")[0] in notes[1]
    torch.testing.assert_close(state["blocks.0.mlp.fc1.weight"], source.state_dict()["blocks.0.mlp.fc1.weight"])


def test_load__official_deit3(tmp_path):
    model = create_model("deit3_small_patch16_224", 4, img_size=32, depth=1)
    rename = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
    weights = {}
    for key, value in model.state_dict().items():
        for ours, official in rename.items():
            key = key.replace(ours, official)
        weights[key] = torch.full_like(value, 0.5)
    torch.save({"model": weights}, tmp_path / "x.pth")
    assert load_checkpoint(model, tmp_path / "x.pth") == [
        "LayerScale renamed from gamma_1, gamma_2 to ls1.gamma, ls2.gamma."
    ]
    assert model.blocks[0].ls2.gamma[0].item() == 0.5


def test_load__google_release(tmp_path):
    """Load an .npz with the names and layouts of the JAX code."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=4)
    width, heads = 192, 3
    block, rng = "Transformer/encoderblock_0/", np.random.default_rng(0)
    attention = block + "MultiHeadDotProductAttention_1/"
    arrays = {
        "embedding/kernel": (16, 16, 3, width),
        "embedding/bias": (width,),
        "cls": (1, 1, width),
        "Transformer/posembed_input/pos_embedding": (1, 5, width),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
        "head/kernel": (width, 4),
        "head/bias": (4,),
        block + "LayerNorm_0/scale": (width,),
        block + "LayerNorm_0/bias": (width,),
        block + "LayerNorm_2/scale": (width,),
        block + "LayerNorm_2/bias": (width,),
        block + "MlpBlock_3/Dense_0/kernel": (width, 4 * width),
        block + "MlpBlock_3/Dense_0/bias": (4 * width,),
        block + "MlpBlock_3/Dense_1/kernel": (4 * width, width),
        block + "MlpBlock_3/Dense_1/bias": (width,),
        attention + "out/kernel": (heads, 64, width),
        attention + "out/bias": (width,),
    }
    arrays |= {attention + f"{n}/kernel": (width, heads, 64) for n in ("query", "key", "value")}
    arrays |= {attention + f"{n}/bias": (heads, 64) for n in ("query", "key", "value")}
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in arrays.items()}
    np.savez(tmp_path / "x.npz", **values)
    load_checkpoint(model, tmp_path / "x.npz")
    torch.testing.assert_close(model.head.weight.detach(), torch.from_numpy(values["head/kernel"].T.copy()))
    query = values[attention + "query/kernel"].reshape(width, width).T
    torch.testing.assert_close(model.blocks[0].attn.qkv.weight.detach()[:width], torch.from_numpy(query.copy()))


def test_load__allowed_keys(tmp_path):
    model = create_model("deit_nano", 4, img_size=16, token_head=True)
    torch.save(create_model("deit_nano", 4, img_size=16).state_dict(), tmp_path / "plain.pth")
    with pytest.raises(ConfigError, match=r"2 missing keys \(aux_head.bias, aux_head.weight\)"):
        load_checkpoint(model, tmp_path / "plain.pth")
    load_checkpoint(model, tmp_path / "plain.pth", allow=["aux_head.*"])
    torch.save(model.state_dict(), tmp_path / "dense.pth")
    notes = load_checkpoint(create_model("deit_nano", 4, img_size=16), tmp_path / "dense.pth")
    assert notes == ["classifier of tokens (aux_head) dropped; model.token_head=true keeps it."]


def test_load__safetensors_and_old_files(model, tmp_path):
    save_file(state(5), tmp_path / "x.safetensors")
    load_checkpoint(model, tmp_path / "x.safetensors")
    assert first(model) == 5
    namespace = argparse.Namespace(lr=1e-3)  # official scripts save their arguments, in the format of torch < 1.6
    torch.save(
        {"state_dict": state(6), "args": namespace}, tmp_path / "x.pth.tar", _use_new_zipfile_serialization=False
    )
    load_checkpoint(model, tmp_path / "x.pth.tar")
    assert first(model) == 6


def test_load__positions_not_a_square_grid(tmp_path):
    torch.save(create_model("deit_nano", 4, img_size=(16, 32)).state_dict(), tmp_path / "x.pth")
    with pytest.raises(ConfigError, match="do not form a square grid"):
        load_checkpoint(create_model("deit_nano", 4, img_size=32), tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["t2t_vit_7", "lvvit_t"])
def test_pretrained__official_file_through_timm(name):
    source = timm.create_model(name, img_size=32)
    overlay = {"state_dict": {"state_dict_ema": {f"module.{k}": v for k, v in source.state_dict().items()}}}
    model = timm.create_model(name, img_size=64, num_classes=5, pretrained=True, pretrained_cfg_overlay=overlay)
    key = "blocks.3.attn.qkv.weight"
    torch.testing.assert_close(model.state_dict()[key], source.state_dict()[key])
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (lambda: {f"_orig_mod.{key}": value for key, value in state(1).items()}, "removed: _orig_mod"),
        (lambda: {"state_dict": {f"model._orig_mod.{key}": value for key, value in state(1).items()}}, "_orig_mod"),
        (
            lambda: {"model": {f"module._orig_mod.{key}": value for key, value in state(1).items()}},
            "wrapper names removed: _orig_mod, module",
        ),
        (
            lambda: {key.replace("blocks.0.", "blocks.0._orig_mod."): value for key, value in state(1).items()},
            "wrapper names removed: _orig_mod",
        ),
        (lambda: {f"net.{key}": value for key, value in state(1).items()}, r"weights found as net\.\*"),
        (lambda: {"state_dict": {f"net.{key}": value for key, value in state(1).items()}}, r"state_dict\.net\.\*"),
        (
            lambda: {f"backbone.{key}": value for key, value in state(1).items()} | {"decoder.weight": torch.zeros(3)},
            r"weights found as backbone\.\* .*ignored: decoder",
        ),
        (
            lambda: {"n_averaged": torch.tensor(3)} | {f"module.{key}": value for key, value in state(1).items()},
            "module",
        ),
        (lambda: {"weights": {"encoder": state(1)}}, r"weights found as weights\.encoder\.\*"),
        (
            lambda: {"student": state(2), "teacher": {f"backbone.{k}": v for k, v in state(1).items()}},
            r"teacher\.backbone",
        ),
        (lambda: {"model": state(1), "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "epoch": 3}, ""),
        (lambda: {"pytorch-lightning_version": "2", "state_dict": {f"net.{k}": v for k, v in state(1).items()}}, "net"),
    ],
)
def test_load__prefixes_found_by_the_names_behind_them(content, note, model, tmp_path):
    torch.save(content(), tmp_path / "x.pth")
    notes = load_checkpoint(model, tmp_path / "x.pth")
    assert first(model) == 1
    assert len(notes) == bool(note)
    assert not note or re.search(note, notes[0])


def test_load__student_on_request(model, tmp_path):
    torch.save({"student": state(2), "teacher": state(1)}, tmp_path / "x.pth")
    load_checkpoint(model, tmp_path / "x.pth", ema=False)
    assert first(model) == 2


def test_load__without_classifier(model, tmp_path):
    torch.save({key: value for key, value in state(1).items() if not key.startswith("head.")}, tmp_path / "x.pth")
    before = first(model)
    assert load_checkpoint(model, tmp_path / "x.pth") == ["no classifier in the checkpoint: head kept untrained."]
    assert (first(model), model.blocks[0].norm1.weight[0].item()) == (before, 1)
    with pytest.raises(ConfigError, match="contains no classifier"):
        load_checkpoint(model, tmp_path / "x.pth", same_classes=True)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html></html>", "a web page"),
        (b"", "empty"),
        (gzip.compress(b"x" * 99), "a gzip archive"),
        (bz2.compress(b"x" * 99), "a bzip2 archive"),
        (lzma.compress(b"x" * 99), "an xz archive"),
        ("zip", "a zip archive"),
        ("tar", "a tar archive"),
    ],
    ids=["lfs", "web page", "empty", "gzip", "bzip2", "xz", "zip", "tar"],
)
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_load__files_of_other_kinds_are_named(content, what, name, model, tmp_path):
    path = tmp_path / name
    if content == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("weights.txt", "x")
    elif content == "tar":
        (tmp_path / "inside").write_bytes(b"x")
        with tarfile.open(path, "w") as archive:
            archive.add(tmp_path / "inside", "inside")
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^ckpt={path}: is {what}"):
        load_checkpoint(model, path)


def deit(size, **kwargs):
    return create_model("deit_nano", 4, img_size=size, patch_size=8, **kwargs)


def checkpoint_for(network, size):
    """Return a checkpoint as a run of vitrail writes it, for images of `size`."""
    weights = {f"model.{key}": value for key, value in network.state_dict().items()}
    return {"state_dict": weights, "config": {}, "classes": list("abcd"), "input": {"size": size}}


@pytest.mark.parametrize(
    ("old", "new"), [((16, 64), (16, 64)), ((16, 64), (32, 32)), ((32, 32), (16, 64)), ((16, 32), (24, 64))]
)
def test_positions__from_the_recorded_image_size(old, new, tmp_path):
    """Tokens of 16 x 64 and of 32 x 32 pixels are equal in number, but lie elsewhere."""
    source = deit(old)
    torch.save(checkpoint_for(source, old), tmp_path / "x.ckpt")
    model = deit(new)
    notes = load_checkpoint(model, tmp_path / "x.ckpt")
    grids = [(size[0] // 8, size[1] // 8) for size in (old, new)]
    expected = resample_abs_pos_embed(
        source.pos_embed, list(grids[1]), list(grids[0]), num_prefix_tokens=1, antialias=False
    )
    torch.testing.assert_close(model.pos_embed, expected)
    assert notes == (
        []
        if old == new
        else [
            f"position embeddings resized from {grids[0][0]}x{grids[0][1]} to {grids[1][0]}x{grids[1][1]}"
            " (bicubic, not antialiased)."
        ]
    )


def test_positions__from_the_config_beside_the_file(tmp_path):
    source = deit((16, 64))
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    described = {"architecture": "deit_nano", "pretrained_cfg": {"input_size": [3, 16, 64]}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    model = deit((16, 64))
    assert load_checkpoint(model, tmp_path / "model.safetensors") == []
    torch.testing.assert_close(model.pos_embed, source.pos_embed)


@pytest.mark.parametrize("arguments", [{"img_size": None, "input_size": [3, 16, 64]}, {"input_size": (16, 64)}])
def test_positions__from_the_arguments_of_official_scripts(arguments, tmp_path):
    source = deit((16, 64))
    torch.save({"state_dict": source.state_dict(), "args": argparse.Namespace(**arguments)}, tmp_path / "x.pth.tar")
    model = deit((16, 64))
    assert load_checkpoint(model, tmp_path / "x.pth.tar") == []


@pytest.mark.parametrize("size", [[224], "224", 0, 1.5])
def test_origin__of_other_programs_is_not_trusted(size, tmp_path):
    foreign = {"config": {"data": {"image_size": size}}, "classes": ["a"], "args": argparse.Namespace(img_size=size)}
    assert origin_of(foreign, None).size is None
    assert origin_of({"config": "text", "classes": 3}, None) == Origin()


def test_positions__square_is_assumed_and_said(tmp_path):
    torch.save(deit((32, 32)).state_dict(), tmp_path / "x.pth")
    model = deit((16, 64))
    assert load_checkpoint(model, tmp_path / "x.pth") == [
        "position embeddings resized from 4x4 (assumed: the file records no image size) to 2x8 (bicubic, not"
        " antialiased)."
    ]


@pytest.mark.parametrize("names", [("deit_nano_distilled", "deit_nano"), ("deit_nano", "deit_nano_distilled")])
def test_load__distillation_token_is_named(names, tmp_path):
    torch.save(create_model(names[0], 4, img_size=32).state_dict(), tmp_path / "x.pth")
    with pytest.raises(ConfigError, match=r"(has|lacks) the distillation token that \w+ (lacks|needs)"):
        load_checkpoint(create_model(names[1], 4, img_size=32), tmp_path / "x.pth")


def test_classes__same_names_in_another_order_are_reordered(tmp_path):
    source = deit((32, 32))
    torch.save(checkpoint_for(source, (32, 32)), tmp_path / "x.ckpt")
    model = deit((32, 32))
    notes = load_checkpoint(model, tmp_path / "x.ckpt", classes=["d", "a", "c", "b"])
    assert notes == ["the classes are in another order: head reordered."]
    torch.testing.assert_close(model.head.weight, source.head.weight[[3, 0, 2, 1]])


def test_classes__other_names_of_the_same_number(tmp_path):
    source = deit((32, 32))
    torch.save(checkpoint_for(source, (32, 32)), tmp_path / "x.ckpt")
    model = deit((32, 32))
    before = model.head.weight.detach().clone()
    notes = load_checkpoint(model, tmp_path / "x.ckpt", classes=["a", "b", "c", "e"])
    assert notes == ["the data's classes are not the checkpoint's: 1 missing (d), 1 new (e): head not loaded."]
    torch.testing.assert_close(model.head.weight.detach(), before)


def test_classes__unknown_names_are_kept_and_said(tmp_path):
    source = deit((32, 32))
    torch.save(source.state_dict(), tmp_path / "x.pth")
    model = deit((32, 32))
    notes = load_checkpoint(model, tmp_path / "x.pth", classes=list("abcd"))
    assert notes == ["class names are not recorded: head kept, taken to be for the data's classes in their order."]
    torch.testing.assert_close(model.head.weight, source.head.weight)


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("cait_xxs24_224", {"depth": 1}),
        ("beit_base_patch16_224", {"depth": 1}),
        ("convit_tiny", {"depth": 1}),
        ("eva02_tiny_patch14_224", {"depth": 1}),
        ("levit_128s", {}),
    ],
)
def test_load__networks_of_timm_with_tables_and_names_of_their_own(name, depth, tmp_path):
    source = timm.create_model(name, num_classes=3, **depth)
    torch.save({"model": source.state_dict()}, tmp_path / "x.pth")
    model = timm.create_model(name, num_classes=3, **depth)
    load_checkpoint(model, tmp_path / "x.pth", same_classes=True)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
