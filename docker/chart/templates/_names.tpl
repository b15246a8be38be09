{{- define "stepvideo.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-{{ .Chart.Name }}{{ end }}
{{- end }}

{{- define "stepvideo.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "stepvideo.labels" -}}
{{ include "stepvideo.selector" . }}
app.kubernetes.io/version: {{ .Values.image.tag | default .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- /* With a digest the tag is for people: what is pulled is what the digest names. */}}
{{- define "stepvideo.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ with .Values.image.digest }}@{{ . }}{{ end }}
{{- end }}

{{- /* The layout's ranks are the product of its numbers; "single" has none, and is one rank. */}}
{{- define "stepvideo.checkLayout" -}}
{{- $ranks := 1 }}
{{- $layout := regexFind "layout *= *\"[^\"]*\"" .Values.config }}
{{- range regexFindAll "[0-9]+" $layout -1 }}{{ $ranks = mul $ranks (atoi .) }}{{ end }}
{{- if ne (int $ranks) (int .Values.gpus) }}
{{- fail (printf "gpus must be what the layout in config needs, %d for %s, got %d: change one of them." (int $ranks) ($layout | default "the default layout") (int .Values.gpus)) }}
{{- end }}
{{- if and .Values.tls.mutual (not .Values.tls.secret) }}
{{- fail "tls.mutual needs tls.secret, got none: name the secret." }}
{{- end }}
{{- end }}
