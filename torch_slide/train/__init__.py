"""The training program, ``python -m torch_slide.train``, and its parts."""
