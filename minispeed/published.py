"""Published machines: what datasheets promise, and how much of it large products reach.

Every figure is dense: datasheets print twice as much, for matrices of which half is zero. A link's bandwidth is one
way, half of what datasheets print. Memory is in units of 1e9 bytes, as printed: what a driver reports is a little
more, which leaves room for its own. fp32 is without TF32, which torch leaves off; V100 has no products in bf16.

    peak, memory, NVLink   NVIDIA's datasheets of V100, A100, H100, H200 and L4 (https://www.nvidia.com/en-us/data-center/)
                           and of HGX B200 (https://www.nvidia.com/en-us/data-center/hgx/)
    machines, networks     DGX-1 and the DGX of A100, H100, H200, B200 (https://docs.nvidia.com/dgx/): 100 Gb/s for two
                           devices of a DGX-1, else 200 or 400 Gb/s for each; L4: a machine of eight with 100 Gb/s,
                           Google's g2-standard-96 (https://cloud.google.com/compute/docs/gpus)
    efficiency             the fastest of many bf16 products: A100 271.2, H100 794.5, B200 1745 TFLOP/s (Bekman, Machine
                           Learning Engineering, https://github.com/stas00/ml-engineering), L4 91.4 TFLOP/s
                           (https://github.com/mag-/gpu_benchmark). H200 has H100's chip and is taken for as good; for
                           V100 A100's is assumed; and other dtypes are taken to reach as much as bf16
    latencies              a step of a ring in NCCL's own model of its simple protocol: NVLink 3.4, PCIe 5.7, a network
                           9.6 microseconds (https://github.com/NVIDIA/nccl, src/graph/tuning.cc)
    attention              0.5 of the peak on Volta, Ampere and Ada, the least that FlashAttention-2 reports for an A100
                           (Dao 2023, https://arxiv.org/abs/2307.08691), 0.35 on later chips, what FlashAttention-3 says
                           that it reaches on an H100 (Shah et al. 2024, https://arxiv.org/abs/2407.08608)
    assumed, unmeasured    0.9 of the memory's peak for element-wise operations; 5 microseconds for torch to launch one

Where one of these machines is at hand, `minispeed calibrate` replaces all of it by what is measured.
"""

from collections.abc import Mapping
from typing import NamedTuple

from minispeed.profiles import Link, Profile, Rates

ELEMENTWISE, OVERHEAD = 0.9, 5e-6
NVLINK, PCIE, NETWORK = 3.4e-6, 5.7e-6, 9.6e-6  # seconds of a step
TERA, GIGA = 1e12, 1e9


class _Chip(NamedTuple):
    """TFLOP/s by dtype, as the datasheet has them; what share of it products reach, and what share attention."""

    tera: Mapping[str, float]
    products: float
    attention: float


def _machine(
    name: str,
    device: str,
    chip: _Chip,
    *,
    memory: float,
    bandwidth: float,
    link: Link,
    network: float,
    pcie: float,
    host_memory: float,
) -> Profile:
    """Return a machine of eight devices.

    memory       of a device, and of the machine: 1e9 bytes
    bandwidth    of a device's memory; network, pcie: of each device, one way: 1e9 bytes a second
    """
    peak = {dtype: rate * TERA for dtype, rate in chip.tera.items()}
    busy = Rates(
        ranks=8,
        flops={dtype: rate * chip.products for dtype, rate in peak.items()},
        bandwidth=bandwidth * GIGA * ELEMENTWISE,
        overhead=OVERHEAD,
        link=link,
        attention={dtype: rate * chip.attention for dtype, rate in peak.items()},
    )
    return Profile(
        name=name,
        source=f"datasheet of NVIDIA {device}; efficiency of products as published, the rest in minispeed/published.py",
        per_machine=8,
        memory=int(memory * GIGA),
        rates=(busy,),
        between=Link(latency=NETWORK, bandwidth=network * GIGA),
        host=Link(latency=PCIE, bandwidth=pcie * GIGA),
        host_memory=int(host_memory * GIGA),
        peak=peak,
        efficiency=chip.products,
    )


def _nvlink(bandwidth: float) -> Link:
    return Link(latency=NVLINK, bandwidth=bandwidth * GIGA)


_VOLTA = _Chip({"fp64": 7.8, "fp32": 15.7, "fp16": 125.0}, 0.869, 0.5)
_AMPERE = _Chip({"fp64": 19.5, "fp32": 19.5, "bf16": 312.0, "fp16": 312.0}, 0.869, 0.5)
_HOPPER = _Chip({"fp64": 67.0, "fp32": 67.0, "bf16": 989.5, "fp16": 989.5}, 0.803, 0.35)
_BLACKWELL = _Chip({"fp64": 37.0, "fp32": 75.0, "bf16": 2250.0, "fp16": 2250.0}, 0.776, 0.35)
_ADA = _Chip({"fp64": 0.473, "fp32": 30.3, "bf16": 121.0, "fp16": 121.0}, 0.755, 0.5)

PUBLISHED: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        _machine("v100", "V100 SXM2 32GB in a DGX-1", _VOLTA, memory=32, bandwidth=900,
                 link=_nvlink(150), network=6.25, pcie=16, host_memory=512),
        _machine("a100-40gb", "A100 SXM 40GB in a DGX", _AMPERE, memory=40, bandwidth=1555,
                 link=_nvlink(300), network=25, pcie=32, host_memory=1000),
        _machine("a100-80gb", "A100 SXM 80GB in a DGX", _AMPERE, memory=80, bandwidth=2039,
                 link=_nvlink(300), network=25, pcie=32, host_memory=2000),
        _machine("h100", "H100 SXM in a DGX", _HOPPER, memory=80, bandwidth=3350,
                 link=_nvlink(450), network=50, pcie=64, host_memory=2000),
        _machine("h200", "H200 SXM in a DGX", _HOPPER, memory=141, bandwidth=4800,
                 link=_nvlink(450), network=50, pcie=64, host_memory=2000),
        _machine("b200", "B200 SXM in a DGX", _BLACKWELL, memory=180, bandwidth=8000,
                 link=_nvlink(900), network=50, pcie=64, host_memory=2000),
        _machine("l4", "L4, eight in a g2-standard-96", _ADA, memory=24, bandwidth=300,
                 link=Link(latency=PCIE, bandwidth=32 * GIGA), network=1.5625, pcie=32, host_memory=384),
    )
}  # fmt: skip
