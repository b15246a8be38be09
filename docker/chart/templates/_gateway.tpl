{{- define "stepvideo.gateway.name" -}}
{{ include "stepvideo.name" . }}-gateway
{{- end }}

{{- /* Another name than the server's: its service, policies and monitors must not find these pods. */}}
{{- define "stepvideo.gateway.selector" -}}
app.kubernetes.io/name: stepvideo-gateway
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "stepvideo.gateway.labels" -}}
{{ include "stepvideo.gateway.selector" . }}
app.kubernetes.io/version: {{ .Values.gateway.image.tag | default .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "stepvideo.gateway.image" -}}
{{- with .Values.gateway.image }}
{{- .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ with .digest }}@{{ . }}{{ end }}
{{- end }}
{{- end }}

{{- /* The servers as a list of TOML, which is one of JSON, too. */}}
{{- define "stepvideo.gateway.servers" -}}
{{ .Values.gateway.servers | default (list (printf "%s:8001" (include "stepvideo.name" .))) | toJson }}
{{- end }}

{{- define "stepvideo.gateway.tls" -}}
{{- with .Values.gateway.tls }}
{{- if .secret -}}
root_certificates = "/tls/ca.crt"
{{- if .mutual }}
private_key = "/tls/tls.key"
certificate_chain = "/tls/tls.crt"
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "stepvideo.gateway.config" -}}
{{ tpl .Values.gateway.config . }}
{{- end }}

{{- define "stepvideo.gateway.check" -}}
{{- with .Values.gateway }}
{{- if not .servers }}
{{- if and $.Values.tls.secret (or (not .tls.secret) (and $.Values.tls.mutual (not .tls.mutual))) }}
{{- fail "gateway.tls.secret must be set where tls.secret is, and gateway.tls.mutual where tls.mutual is: the server of this release has TLS." }}
{{- end }}
{{- if or $.Values.autoscaling.enabled (gt (int $.Values.replicas) 1) }}
{{- fail "gateway.servers must name each server where a release has several pods, got none: behind one service a run is not found again. Install a release for each server, and name their services." }}
{{- end }}
{{- end }}
{{- if and (gt (int .replicas) 1) (not (and .database.secret .volume.claim)) }}
{{- fail "gateway.database.secret and gateway.volume.claim must be set where gateway.replicas is above 1: several gateways share a PostgreSQL database and the folder of videos." }}
{{- end }}
{{- end }}
{{- end }}
