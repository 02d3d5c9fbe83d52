"""Detection data: COCO, VOC and the digits, checked, and configs that fit them."""
