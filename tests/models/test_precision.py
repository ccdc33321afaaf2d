"""Half precision, compilation and export of every model family."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import vitrail  # noqa: F401
from vitrail.models import create_model, forward_heads

pytestmark = pytest.mark.thorough

FAMILIES = [
    "t2t_vit_7",
    "t2t_vit_t_14",
    "t2t_vit_14_se",
    "t2t_vit_16_ghost",
    "t2t_vit_dense",
    "lvvit_t",
    "lvvit",
    "vit",
    "so_vit_7",
    "sot_tiny",
]
FAMILIES += ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "vit_nano"]
FAMILIES += ["vit5_small"]


def small(name, **kwargs):
    torch.manual_seed(0)
    depth = {"stages": (1, 1)} if name == "t2t_vit_dense" else {"depth": 2}
    return timm.create_model(name, img_size=32, num_classes=5, **depth, **kwargs)


def train_with_large_weights(name, precision, steps):
    """Train on noise with initial weights times 3, and check that every loss and gradient is finite."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=32, num_classes=10).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for step in range(steps):
        labels = torch.randint(0, 10, (2,))
        with torch.autocast("cpu", precision):
            heads = forward_heads(model, torch.randn(2, 3, 32, 32))
        loss = F.cross_entropy(heads.cls.float(), labels)
        if heads.tokens is not None:
            loss = loss + F.cross_entropy(heads.tokens.float().mT, labels[:, None].expand(heads.tokens.shape[:2]))
        optimizer.zero_grad()
        loss.backward()
        assert loss.isfinite(), step
        for key, parameter in model.named_parameters():
            assert parameter.grad.isfinite().all(), (step, key)
        optimizer.step()


@pytest.mark.parametrize("steps", [60, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["t2t_vit_7", "lvvit_t", "so_vit_7"])
@pytest.mark.sample(1)
def test_bf16__finite_with_large_weights(name, steps):
    train_with_large_weights(name, torch.bfloat16, steps)


def test_fp16__finite_with_large_weights():
    train_with_large_weights("t2t_vit_7", torch.float16, steps=20)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t2t_vit_7", "lvvit_t"])
def test_fp16__finite_with_large_weights_for_many_steps(name):
    train_with_large_weights(name, torch.float16, steps=200)


@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_t_14", "lvvit_t", "so_vit_7", "sot_tiny"])
def test_bf16__close_to_fp32(name):
    model = small(name).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(images)
    assert (half - exact).abs().max() < 0.05 * exact.std()


@pytest.mark.slow  # tests/training/test_compile.py compiles whole runs of most families
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_compile__one_graph(name, training):
    """The model and its heads compile to one graph each, forward and backward, with the same results."""
    torch._dynamo.reset()
    drops = {"token_drop": 0.0} if name in ("t2t_vit_7", "t2t_vit_14_se", "t2t_vit_16_ghost", "t2t_vit_dense") else {}
    model = small(name, **drops).train(training)
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-5)
    heads = torch.compile(forward_heads, fullgraph=True, backend="aot_eager")(model, images)
    torch.testing.assert_close(heads.cls, forward_heads(model, images).cls, rtol=1e-4, atol=1e-5)
    if training:
        heads.cls.sum().backward()


def test_compile__one_graph_for_all_boxes():
    torch._dynamo.reset()
    model, images = small("lvvit_t"), torch.randn(2, 3, 32, 32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(forward_heads, fullgraph=True, backend=counter)
    for box in ([0, 0, 1, 1], [0, 1, 2, 2], [1, 1, 1, 1]):
        expected = forward_heads(model, images, torch.tensor(box))
        torch.testing.assert_close(compiled(model, images, torch.tensor(box)).cls, expected.cls, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.sample(5)
def test_export__evaluation_mode(name):
    model = small(name).eval()
    images = torch.randn(2, 3, 32, 32)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (torch.randn(3, 3, 32, 32),), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(images), model(images), rtol=1e-4, atol=1e-5)


def test_export__with_token_head():
    model = create_model("deit_nano", 5, img_size=16, token_head=True).eval()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), model(images))
