"""What a trained model looks at, what it confuses, and figures of both.

Everything but `view` is a function of tensors and callables and knows no model class. The modules are imported one by
one (`from fgvc_ext.explain.cam import class_activation_maps`), because some of them need matplotlib or Pillow; the way
from a model to them, `explain.view_of(model)`, needs neither:

===============  ====================================================================================
`maps`           activation maps, masks, boxes and points drawn onto images
`cam`            class activation maps, and measures of where and how widely they look
`confusions`     confusion matrix, the most confused pairs of classes, groups of confusable classes
`embeddings`     two-dimensional views of features
`figures`        the figures of a report
`view`           a model as functions of images, as its own `explain` shows it
`crop`           where boxes and points lie in the crop that a network sees
`scene`          the test images: decoded several at a time
`comparison`     all of it for several trained models, written into a run folder
`document`       HTML reports
===============  ====================================================================================
"""

from fgvc_ext.explain.view import ModelView, view_of

__all__ = ["ModelView", "view_of"]
