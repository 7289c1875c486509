"""`degas ray`: workers as actors on a Ray cluster. Ray places, restarts and counts them; tokens never pass through it.

Only `cluster` and `commands` import Ray, and only once they are used: everything else runs and is tested without it.
"""
