"""Driving: plans as waypoints, written as text, and how they are judged.

Convention: a plan is A waypoints (x, y) in metres in the car's own frame of now, x to the right and y ahead, every half
a second from half a second on.
"""
