recipe = None
