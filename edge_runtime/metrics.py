"""What is measured of one request, each quantity defined once, with its formula and unit.

Counts are of tokens and forwards; times are wall-clock seconds from `time.perf_counter`.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Metrics:
    """Counters and times of one request.

    Attributes:
        prompt_tokens: Length of the prompt.
        reused_tokens: Leading prompt tokens whose keys and values were still held from the request before.
        new_tokens: Emitted tokens.
        target_forwards: Forwards of the target after the prompt's, one for each decoding step.
        proposed_tokens: Drafted tokens given to the target.
        accepted_tokens: Drafted tokens kept.
        ttft_s: Seconds from the request to its first token.
        decode_s: Seconds from the first token to the last.
        draft_s: Seconds of decode_s spent drafting.
        accepted_by_position: How often draft token i of a block was kept.
        proposed_by_position: How often a block had a draft token i.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    target_forwards: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    draft_s: float = 0.0
    load_s: float = 0.0
    accepted_by_position: list[int] = field(default_factory=list)
    proposed_by_position: list[int] = field(default_factory=list)

    def count_block(self, num_proposed: int, num_accepted: int) -> None:
        """Count one decoding step."""
        self.target_forwards += 1
        self.proposed_tokens += num_proposed
        self.accepted_tokens += num_accepted
        while len(self.proposed_by_position) < num_proposed:
            self.proposed_by_position.append(0)
            self.accepted_by_position.append(0)
        for position in range(num_proposed):
            self.proposed_by_position[position] += 1
            self.accepted_by_position[position] += position < num_accepted

    @property
    def tpot_ms(self) -> float:
        """Milliseconds for each token after the first: 1000 decode_s / (new_tokens - 1)."""
        return 1000 * self.decode_s / (self.new_tokens - 1) if self.new_tokens > 1 else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: 1000 / tpot_ms."""
        return 1000 / self.tpot_ms if self.tpot_ms else 0.0

    @property
    def acceptance_rate(self) -> float:
        """accepted_tokens / proposed_tokens; 0 where nothing was proposed."""
        return self.accepted_tokens / self.proposed_tokens if self.proposed_tokens else 0.0

    @property
    def block_efficiency(self) -> float:
        """Tokens emitted for each decoding step, at most K + 1: (new_tokens - 1) / target_forwards."""
        return (self.new_tokens - 1) / self.target_forwards if self.target_forwards else 0.0

    @property
    def draft_share(self) -> float:
        """Share of the decoding time spent drafting: draft_s / decode_s."""
        return self.draft_s / self.decode_s if self.decode_s else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return what `edge-run generate --json` reports."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "new_tokens": self.new_tokens,
            "ttft_s": round(self.ttft_s, 6),
            "tpot_ms": round(self.tpot_ms, 4),
            "tokens_per_second": round(self.tokens_per_second, 3),
            "target_forwards": self.target_forwards,
            "proposed_tokens": self.proposed_tokens,
            "accepted_tokens": self.accepted_tokens,
            "acceptance_rate": round(self.acceptance_rate, 4),
            "block_efficiency": round(self.block_efficiency, 4),
            "draft_share": round(self.draft_share, 4),
            "accepted_by_position": self.accepted_by_position,
            "proposed_by_position": self.proposed_by_position,
            "peak_rss_bytes": peak_rss_bytes(),
            "load_s": round(self.load_s, 4),
        }


def mbsu(block_efficiency: float, num_draft_tokens: float, relative_size: float) -> float:
    """Return the memory-bound speed-up: what drafting gains where reading weights is all that takes time.

    block_efficiency / (c K + 1), below 1 for a draft of which nothing is accepted. Much code has c τ / (c K + 1) after
    Goel et al. 2024 (arXiv 2403.00858): with c = draft / target that is wrong, 0.03 where 2.6 is meant.

    Args:
        block_efficiency: τ, tokens emitted for each decoding step.
        num_draft_tokens: K; its mean where it changes from step to step.
        relative_size: c, the draft's size divided by the target's; 0 for a drafter without weights.
    """
    return block_efficiency / (relative_size * num_draft_tokens + 1)


def peak_rss_bytes() -> int:
    """Return the most resident memory this process has had, in bytes; 0 where the system does not tell."""
    if sys.platform == "win32":
        return _peak_rss_on_windows()
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage tells on Linux may be the parent's, which a new program inherits
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii", errors="replace"))
        return int(found[1]) * 1024 if found else 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _peak_rss_on_windows() -> int:
    import ctypes
    from ctypes import wintypes

    class Counters(ctypes.Structure):
        _fields_ = (
            ("cb", wintypes.DWORD),
            ("PageFaultCount", wintypes.DWORD),
            *(
                (name, ctypes.c_size_t)
                for name in ("PeakWorkingSetSize", "WorkingSetSize", "a", "b", "c", "d", "e", "f")
            ),
        )

    counters = Counters()
    counters.cb = ctypes.sizeof(counters)
    windll = ctypes.windll  # type: ignore[attr-defined,unused-ignore]
    windll.kernel32.GetCurrentProcess.restype = wintypes.HANDLE
    windll.psapi.GetProcessMemoryInfo.argtypes = (wintypes.HANDLE, ctypes.c_void_p, wintypes.DWORD)
    process = windll.kernel32.GetCurrentProcess()
    done = windll.psapi.GetProcessMemoryInfo(process, ctypes.byref(counters), counters.cb)
    return int(counters.PeakWorkingSetSize) if done else 0
