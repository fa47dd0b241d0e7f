"""A barrier among the programs of one launch, in two halves: what is loaded between them is on its way while the others
arrive. All programs must be resident (`launch_cooperative_grid`), and none may leave one out.

The counter, int32 [1], is 0 when the launch begins; `wait` for the n-th barrier waits for n * programs arrivals. What
was written before `arrive` is there for everyone after `wait` (release and acquire, in PTX's memory model).
"""

from __future__ import annotations

import triton
import triton.language as tl

ARRIVE = tl.constexpr("""{
    .reg .pred first;
    .reg .u32 thread;
    bar.sync 0;
    mov.u32 thread, %tid.x;
    setp.eq.u32 first, thread, 0;
    @first red.release.gpu.global.add.u32 [$1], 1;
    mov.u32 $0, 0;
}""")

WAIT = tl.constexpr("""{
    .reg .pred other, early, lost;
    .reg .u32 thread, now, tries;
    mov.u32 thread, %tid.x;
    setp.ne.u32 other, thread, 0;
    @other bra ALL_THERE;
    mov.u32 tries, 0;
    ASK_AGAIN:
    ld.acquire.gpu.global.u32 now, [$1];
    add.u32 tries, tries, 1;
    setp.gt.u32 lost, tries, 10000000;
    @lost trap;
    setp.lt.u32 early, now, $2;
    @early bra ASK_AGAIN;
    ALL_THERE:
    bar.sync 0;
    mov.u32 $0, 0;
}""")
"""It traps after some seconds: a barrier that is never complete is an error of ours."""


@triton.jit
def arrive(counter):
    tl.inline_asm_elementwise(ARRIVE, "=r,l", [counter.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def wait(counter, arrivals):
    tl.inline_asm_elementwise(WAIT, "=r,l,r", [counter.to(tl.int64), arrivals], dtype=tl.int32, is_pure=False, pack=1)
