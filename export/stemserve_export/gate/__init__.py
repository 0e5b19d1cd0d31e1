"""The release gate: what an artefact does, in numbers, from its checkpoint to what is served.

``measures`` holds the numbers, ``thresholds`` what they must be and why, ``signals`` the audio
they are taken on, ``checks`` and ``served_checks`` the questions, ``gate`` their order.
"""
