"""Known schedules, one file each."""

from schedules.baselines.chimera import chimera
from schedules.baselines.gpipe import gpipe
from schedules.baselines.interleaved import interleaved
from schedules.baselines.one_f_one_b import one_f_one_b
from schedules.baselines.serial import serial
from schedules.baselines.zero_bubble import zero_bubble_h1, zero_bubble_v

__all__ = ["chimera", "gpipe", "interleaved", "one_f_one_b", "serial", "zero_bubble_h1", "zero_bubble_v"]
