"""What the plan knows about machines: a few numbers of each accelerator, or measured ones.

Peaks are those of dense matrix products, links are one direction of one accelerator. The share of
the peak that large products reach (`efficiency`) is no vendor's number: it is chosen so that a plan
for 8 billion weights on 8 H100 comes out near what torchtitan reports for Llama 3.1 (5,762 tokens
per second and GPU, compiled 6,667; a test). Megatron-LM reports 41 to 48% for whole steps.
"""

from dataclasses import dataclass

from mmpt.config import UserError

GB, TB, TFLOPS = 1e9, 1e12, 1e12


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One accelerator (or process) and its links; rates in bytes or operations per second."""

    name: str
    bf16: float
    fp32: float
    memory: float  # bytes
    memory_rate: float
    link: float  # to others of its node
    network: float  # to other nodes
    link_latency: float = 8e-6  # seconds of a collective of two, beside its bytes
    network_latency: float = 20e-6
    node: int = 8
    efficiency: float = 0.5  # of the peak that the model's products reach
    usable: float = 0.92  # of the memory; the rest is context, fragments and buffers of links
    overlap: float = 0.9  # of the computing time in which weights and gradients travel unnoticed
    small_step: float = 0.0  # seconds a layer, forward and back, beside products and memory

    def peak(self, precision: str) -> float:
        """Of products in fp32, or in bf16, by which fp8 is measured too."""
        return self.fp32 if precision == "fp32" else self.bf16


MACHINES = {
    # NVIDIA A100 80GB SXM data sheet: 312 and 19.5 TFLOPS, 2,039 GB/s, NVLink 600 GB/s both ways;
    # DGX A100: one ConnectX-6 of 200 Gb/s per GPU
    "a100": Machine(
        name="A100 SXM 80GB",
        bf16=312 * TFLOPS,
        fp32=19.5 * TFLOPS,
        memory=80 * GB,
        memory_rate=2.039 * TB,
        link=300 * GB,
        network=25 * GB,
    ),
    # NVIDIA H100 SXM data sheet: 989.5 (half of the number with sparsity) and 67 TFLOPS, 3.35 TB/s,
    # NVLink 900 GB/s both ways; DGX H100: one ConnectX-7 of 400 Gb/s per GPU
    "h100": Machine(
        name="H100 SXM",
        bf16=989.5 * TFLOPS,
        fp32=67 * TFLOPS,
        memory=80 * GB,
        memory_rate=3.35 * TB,
        link=450 * GB,
        network=50 * GB,
    ),
    # NVIDIA H200 SXM data sheet: as H100, with 141 GB at 4.8 TB/s
    "h200": Machine(
        name="H200 SXM",
        bf16=989.5 * TFLOPS,
        fp32=67 * TFLOPS,
        memory=141 * GB,
        memory_rate=4.8 * TB,
        link=450 * GB,
        network=50 * GB,
    ),
    # NVIDIA HGX B200: 2,250 (half of the number with sparsity) and 80 TFLOPS, 8 TB/s, NVLink
    # 1.8 TB/s both ways; DGX B200: 1,440 GB in eight GPUs, one ConnectX-7 of 400 Gb/s each
    "b200": Machine(
        name="B200 SXM",
        bf16=2250 * TFLOPS,
        fp32=80 * TFLOPS,
        memory=180 * GB,
        memory_rate=8 * TB,
        link=900 * GB,
        network=50 * GB,
    ),
}


def find_machine(name: str) -> Machine:
    """One of the table; UserError for another name."""
    if name not in MACHINES:
        raise UserError(f"unknown device {name!r}; choose from {', '.join(MACHINES)}, cpu")
    return MACHINES[name]
