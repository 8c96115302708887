{{- define "silotune-serve.selector" -}}
app.kubernetes.io/name: silotune-serve
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "silotune-serve.labels" -}}
{{ include "silotune-serve.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "silotune-serve.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{- define "silotune-serve.tokens" -}}
{{ .Values.tokens.existingClaim | default (printf "%s-tokens" .Release.Name) }}
{{- end }}

{{/* What every container of the pod may do, and where it may write. */}}
{{- define "silotune-serve.container" -}}
image: {{ include "silotune-serve.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end }}
