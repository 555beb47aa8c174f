"""The 50 tasks of Meta-World: what they are called in words, and where the hand does them."""

from typing import NamedTuple


class MetaWorldTask(NamedTuple):
    """One task.

    prompts: its wordings. go, act: where the hand goes, and what it does there, for `Expert.doing`.
    offset: where that is, metres from the object. near: how near to it, in metres, as the hand slides along what it
    moves.
    held: the fingers must fit around the object; see `SawyerExpert`.
    goal: what the task is about is the goal, not the object: the hand itself goes there.
    ball: metres above the goal of a ball that shows it, as it varies and nothing in the scene stands there; None for
    no ball.
    foot: one camera cannot tell how far away a ball in the air is, so that a second ball lies on what is below it.
    Behind a wall it would be hidden; there the depth of goals varies by no more than their radius.
    """

    prompts: tuple[str, ...]
    go: str
    act: str
    offset: tuple[float, float, float]
    near: float = 0.06
    held: bool = False
    goal: bool = False
    ball: float | None = None
    foot: bool = False


_T = MetaWorldTask
TASKS = {
    # Those that demonstrations have been made of since there is this simulator, in its order; see `FIRST`.
    "button-press-topdown": _T(("press the button from above",), "go above the button", "press down", (0.0, 0.0, 0.05)),
    "button-press": _T(("press the button",), "go to the button", "press it in", (0.0, -0.05, -0.06)),
    "coffee-button": _T(
        ("press the button of the coffee machine",), "go to the button", "press it in", (0.0, -0.05, -0.06)
    ),
    "handle-press": _T(("push the handle down",), "go above the handle", "push down", (0.0, -0.03, 0.01), 0.04),
    "plate-slide": _T(("slide the plate into the goal",), "go to the plate", "slide it", (0.0, -0.045, 0.055)),
    "window-open": _T(("open the window",), "go to the handle", "slide it open", (-0.03, -0.03, -0.08)),
    "window-close": _T(("close the window",), "go to the handle", "slide it shut", (0.03, -0.03, -0.08)),
    "faucet-open": _T(("open the faucet",), "go to the lever", "turn it open", (-0.03, 0.02, 0.025)),
    "faucet-close": _T(("close the faucet",), "go to the lever", "turn it shut", (0.03, 0.02, 0.025)),
    "drawer-open": _T(("open the drawer",), "go to the handle", "pull", (0.0, 0.0, -0.02)),
    "drawer-close": _T(("close the drawer",), "go to the drawer", "push it in", (0.0, -0.07, 0.0)),
    "door-close": _T(("close the door",), "go to the door", "push it shut", (-0.06, 0.17, 0.07), 0.15),
    # Places where the hand is when the object begins to move, measured with the package's policies.
    "assembly": _T(
        ("put the ring onto the peg",),
        "go to the ring",
        "grasp it and put it onto the peg",
        (-0.01, 0.0, 0.045),
        held=True,
    ),
    "basketball": _T(
        ("put the ball through the hoop", "throw the ball into the basket"),
        "go to the ball",
        "grasp it and take it to the hoop",
        (0.005, 0.0, 0.04),
        held=True,
    ),
    "bin-picking": _T(
        ("move the cube to the other bin",), "go to the cube", "grasp it and take it over", (0.0, 0.0, 0.04), held=True
    ),
    "box-close": _T(
        ("close the box", "put the lid onto the box"),
        "go to the lid",
        "grasp it and put it on",
        (0.0, 0.0, 0.08),
        held=True,
    ),
    "button-press-topdown-wall": _T(
        ("press the button behind the wall from above",), "go above the button", "press down", (0.0, -0.05, 0.045)
    ),
    "button-press-wall": _T(
        ("reach over the wall and press the button",), "go over the wall", "press it in", (0.0, -0.04, 0.03)
    ),
    "coffee-pull": _T(
        ("pull the mug from the coffee machine to the purple ball",),
        "go to the mug",
        "grasp it and pull",
        (0.0, 0.0, 0.07),
        held=True,
        ball=0.0,
    ),
    "coffee-push": _T(
        ("push the mug under the coffee machine",), "go to the mug", "grasp it and push", (0.0, 0.0, 0.065), held=True
    ),
    "dial-turn": _T(("turn the dial",), "go to the dial", "turn it", (0.04, 0.02, 0.09)),
    "disassemble": _T(
        ("take the ring off the peg",), "go to the ring", "grasp it and lift it off", (-0.01, 0.0, 0.04), held=True
    ),
    "door-lock": _T(("lock the door",), "go above the lock", "turn it shut", (-0.02, -0.02, 0.045)),
    "door-open": _T(("open the door",), "go to the handle of the door", "pull it open", (0.05, 0.04, -0.02), 0.1),
    "door-unlock": _T(("unlock the door",), "go to the lock", "turn it open", (-0.03, -0.015, -0.03)),
    "hammer": _T(
        ("drive the nail in with the hammer", "hammer the nail in"),
        "go to the hammer",
        "grasp it and hit the nail",
        (-0.03, 0.0, 0.035),
        held=True,
    ),
    "hand-insert": _T(
        ("put the block into the hole",),
        "go to the block",
        "grasp it and put it in",
        (0.0, 0.0, 0.04),
        held=True,
        ball=0.1,
    ),
    "handle-press-side": _T(
        ("push the handle at the side down",), "go above the handle", "push down", (0.01, 0.005, 0.015)
    ),
    "handle-pull": _T(("pull the handle up",), "go to the handle", "pull up", (0.0, -0.05, 0.025)),
    "handle-pull-side": _T(
        ("pull the handle at the side up",), "go to the handle", "grasp it and pull up", (0.0, 0.0, 0.03), held=True
    ),
    "lever-pull": _T(("pull the lever up",), "go below the lever", "pull up", (0.015, -0.06, -0.11)),
    "peg-insert-side": _T(
        ("insert the peg into the hole at the side", "put the peg into the box from the side"),
        "go to the peg",
        "grasp it and push it in",
        (0.005, 0.0, 0.025),
        held=True,
    ),
    "peg-unplug-side": _T(
        ("unplug the peg", "pull the peg out of the hole"),
        "go to the peg",
        "grasp it and pull",
        (-0.015, 0.0, 0.07),
        held=True,
    ),
    "pick-out-of-hole": _T(
        ("take the puck out of the hole and to the purple ball",),
        "go to the puck",
        "grasp it and lift it out",
        (0.0, 0.0, 0.03),
        held=True,
        ball=0.0,
        foot=True,
    ),
    "pick-place": _T(
        ("pick up the puck and hold it at the purple ball", "pick the puck up and bring it to the purple ball"),
        "go to the puck",
        "grasp it and take it to the ball",
        (0.0, 0.0, 0.04),
        held=True,
        ball=0.0,
        foot=True,
    ),
    "pick-place-wall": _T(
        ("pick up the puck and take it over the wall to the purple ball",),
        "go to the puck",
        "grasp it and take it over the wall",
        (0.0, 0.0, 0.04),
        held=True,
        ball=0.0,
    ),
    "plate-slide-back": _T(
        ("slide the plate back out to the purple ball",),
        "go behind the plate",
        "slide it back",
        (0.005, -0.065, 0.055),
        held=True,
        ball=0.0,
    ),
    "plate-slide-back-side": _T(
        ("slide the plate sideways out to the purple ball",),
        "go to the plate",
        "slide it sideways",
        (0.025, 0.0, 0.06),
        ball=0.0,
    ),
    "plate-slide-side": _T(
        ("slide the plate sideways into the goal, to the purple ball",),
        "go beside the plate",
        "slide it sideways",
        (0.07, 0.0, 0.03),
        ball=0.0,
    ),
    "push": _T(
        ("push the puck to the purple ball",),
        "go to the puck",
        "push it to the ball",
        (0.0, 0.0, 0.035),
        held=True,
        ball=0.0,
    ),
    "push-back": _T(
        ("pull the block back to the purple ball", "push the block back to the purple ball"),
        "go to the block",
        "grasp it and pull it back",
        (0.0, 0.0, 0.04),
        held=True,
        ball=0.0,
    ),
    "push-wall": _T(
        ("push the puck around the wall and below the purple ball",),
        "go to the puck",
        "push it around the wall",
        (0.0, 0.0, 0.035),
        held=True,
        ball=0.15,
    ),
    "reach": _T(
        ("move the hand to the purple ball", "reach the purple ball"),
        "go towards the ball",
        "touch it",
        (0.0, 0.0, 0.0),
        0.1,
        goal=True,
        ball=0.0,
        foot=True,
    ),
    "reach-wall": _T(
        ("move the hand over the wall to the purple ball", "reach the purple ball behind the wall"),
        "go over the wall",
        "touch the ball",
        (0.0, 0.0, 0.0),
        0.1,
        goal=True,
        ball=0.0,
    ),
    "shelf-place": _T(
        ("put the block onto the shelf",),
        "go to the block",
        "grasp it and put it onto the shelf",
        (0.005, 0.0, 0.045),
        0.12,
        held=True,
    ),
    "soccer": _T(
        ("push the ball into the goal", "score a goal with the ball"),
        "go to the ball",
        "push it into the goal",
        (-0.015, -0.02, 0.06),
    ),
    "stick-pull": _T(
        ("pull the thermos to the purple ball with the stick",),
        "go to the stick",
        "grasp it and pull the thermos",
        (-0.01, 0.0, 0.04),
        held=True,
        ball=0.0,
    ),
    "stick-push": _T(
        ("push the thermos to the purple ball with the stick",),
        "go to the stick",
        "grasp it and push the thermos",
        (0.025, 0.0, 0.045),
        held=True,
        ball=0.0,
    ),
    "sweep": _T(
        ("sweep the block to the side",), "go to the block", "sweep it to the side", (0.01, 0.0, 0.055), held=True
    ),
    "sweep-into": _T(
        ("sweep the block into the hole",),
        "go to the block to sweep",
        "sweep it into the hole",
        (-0.005, 0.0, 0.055),
        held=True,
    ),
}

FIRST = tuple(TASKS)[:12]
"""The tasks that programs do when they are told none."""

MT10 = (
    "reach",
    "push",
    "pick-place",
    "door-open",
    "drawer-open",
    "drawer-close",
    "button-press-topdown",
    "peg-insert-side",
    "window-open",
    "window-close",
)
"""The benchmark's set of ten tasks, as the package has it."""

MT50 = tuple(sorted(TASKS))
"""The benchmark's set of fifty tasks, as the package has it."""
