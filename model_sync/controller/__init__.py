"""The sync process: the control API before the repository, enrolment, and the directory of nodes."""
