"""Matting: whose pixel is it, the subject's or the background's, frame by frame and steady over the clip."""
