"""nuScenes (Caesar et al. 2020, arXiv 1903.11027) as it is downloaded: its tables, pictures and CAN bus, for the ego
vehicle, and the truth that plans are judged by. nuscenes-devkit is not needed.

Files: `tables` (JSON files and what is wrong with them), `scenes` (keyframes along a scene), `frames` (the one place
where axes are turned), `can_bus`, `episodes` (state, history and plan of a scene), `truth` (occupancy), `splits`.

Facts are from the schema (nutonomy/nuscenes-devkit, docs/schema_nuscenes.md, at d9de17a); what the field does with them
is from three sources: VAD (hustvl/VAD, tools/data_converter/vad_nuscenes_converter.py, at 1688c4b), UniAD
(OpenDriveLab/UniAD, trajectory_api.py and occflow_label.py, at dd161b2), and OpenDriveVLA (DriveVLA/OpenDriveVLA,
build_llava_conversation.py, at 10e8095). Where a choice is ours it says so, or is marked R (reconstructed).
"""
