"""Render views: make the network's input from images and views, with Pillow or in batches on the training device.

Both renderers give the same result: Pillow's are timm's pixels, bit for bit; the batched one differs by at most 1 of
255 in each operation.
"""

from typing import TYPE_CHECKING

from vitrail_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from vitrail.data.render.device import DeviceRenderer, device_renderer
    from vitrail.data.render.loader import DeviceLoader
    from vitrail.data.render.pil import PILRenderer, Rendered, finish_batch
    from vitrail.data.render.plan import RenderPlan, plan_batch
    from vitrail.data.render.shipping import Shipped, ship
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "DeviceLoader",
    "DeviceRenderer",
    "PILRenderer",
    "RenderPlan",
    "Rendered",
    "Shipped",
    "device_renderer",
    "finish_batch",
    "plan_batch",
    "ship",
]
