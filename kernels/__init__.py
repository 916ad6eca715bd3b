"""GPU kernels, one file each: what it must move and do, a reference, the kernel, one function.

Methods call the public function of a file and never know which of the two ran. The package is
`effnb.kernels`. Nothing is imported here and there is no version: the folder lies at the top of the
checkout, where transformers takes it for a published package of the same name.
"""
