"""From a folder of videos to captioned clips for training: the data pipeline of the paper's Figure 9.

    read -> shots -> basic -> quality -> aesthetic -> watermark -> caption -> kept

`python -m mimir_core.data --videos FOLDER --out FOLDER` runs it; `prepare.prepare` is the same as a
function; `clips.read_kept` and `video.read_frames` are what a trainer reads the result with. PyAV decodes,
PySceneDetect finds the cuts, Ray Data is optional. Nothing here imports PyTorch unless a plug-in does.
"""
