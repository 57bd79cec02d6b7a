"""The fixed sample of the zoo: one class of each kind of architecture, 40 in all."""

SAMPLE = (
    "LlamaForCausalLM", "MistralForCausalLM", "Llama4ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM",
    "Gemma3ForCausalLM", "Phi3ForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM", "GPTNeoXForCausalLM",
    "BloomForCausalLM", "MptForCausalLM", "FalconForCausalLM", "Gemma3ForConditionalGeneration",
    "WhisperForConditionalGeneration",
    "MixtralForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM", "DeepseekV3ForCausalLM", "OlmoeForCausalLM",
    "MambaForCausalLM", "Lfm2ForCausalLM", "BambaForCausalLM", "Qwen3NextForCausalLM",
    "BertModel", "RobertaModel", "DistilBertModel", "AlbertModel", "ElectraModel", "ModernBertModel", "DebertaV2Model",
    "XLNetModel", "EsmModel", "T5ForConditionalGeneration", "BartForConditionalGeneration", "CLIPModel", "SiglipModel",
    "ViTModel", "Dinov2Model", "DINOv3ViTModel",
)  # fmt: skip
