"""Known schedules, one file each."""

from schedules.baselines.gpipe import gpipe
from schedules.baselines.one_f_one_b import one_f_one_b
from schedules.baselines.serial import serial

__all__ = ["gpipe", "one_f_one_b", "serial"]
