"""Tells an MLflow server what happened in a run; the only package that knows MLflow.

One parent run a run folder, one child run a stage key, the student as a registered model. MLflow
is imported by the first upload, never before: a run that has nothing to tell does not load it.

Events are uploaded in order and each is acknowledged after the server took it. A kill between the
two uploads that event again, so every handler can run twice: runs, logged models and versions are
found by a tag before they are made, and MLflow drops metrics and datasets that it already has.
"""
