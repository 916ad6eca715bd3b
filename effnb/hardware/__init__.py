"""Methods that fit models to hardware, and hardware to models: memory, kernels, devices."""
