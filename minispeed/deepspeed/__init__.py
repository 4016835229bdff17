"""DeepSpeed's calls, on our rooms: what a script finds that imports `minispeed as deepspeed`.

Each file is one thing that such scripts call, with DeepSpeed's names, arguments and meaning; what a name does is said
where it stands, and so is each difference. Under which dotted names scripts look for them is `face/`'s affair.

DeepSpeed 0.19.8.  https://deepspeed.readthedocs.io
"""
