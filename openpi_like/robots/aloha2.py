"""ALOHA 2 (Aldaco et al. 2024), recorded as ALOHA is, see `aloha_stationary`.

Its arms are ViperX with the same ranges (mujoco_menagerie/aloha/aloha.xml) and other grippers, whose 0 (closed) to 1
(open) is another way of the fingers; so it is another robot, with statistics of its own.
"""

import dataclasses

from openpi_like.robots.aloha_stationary import ALOHA_STATIONARY

ALOHA2 = dataclasses.replace(ALOHA_STATIONARY, name="aloha2")
