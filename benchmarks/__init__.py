"""How fast is it, against the textbook formulation written out plainly and against what the hardware allows?"""
