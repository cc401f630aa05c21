"""What the fuser does to a prompt, in numbers and in pictures.

pieces    the tokens of both branches in words, and finding one of them by its text
gain      the weight of one piece on either branch
dissect   the tensors of one fusion, their norms, shares and value distributions
report    all of it as plain JSON types
cloud     PCA, t-SNE and the scatter of tokens
canvas    matplotlib without its surprises: literal text, no global state
draw_tokens, draw_map   the two pictures
"""
