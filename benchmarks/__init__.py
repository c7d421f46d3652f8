"""How fast is it, against the textbook formulation written out plainly and against what the hardware allows?"""

if __name__ != "ghostmask.benchmarks":
    raise ImportError(
        f"this package is imported as ghostmask.benchmarks, not as {__name__}: two names would be two copies of it"
    )
